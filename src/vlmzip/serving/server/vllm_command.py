"""The command line of vLLM's own server with vlmzip's plugin, for models that the plugin supports."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, how_to_install
from vlmzip.runtime.loading import source_of
from vlmzip.runtime.pretrained import load_config
from vlmzip.serving.server.settings import Settings
from vlmzip.serving.server.vllm_process import GRACE
from vlmzip.serving.vllm.start import check_model

#: A host that does not exist. vLLM fetches images from any host unless it is given at least one.
NO_HOST = "none.invalid"
#: What vLLM's server puts before its routes.
MIDDLEWARE = "vlmzip.serving.server.vllm_refusal.RefuseChoice"


@dataclass(frozen=True)
class Served:
    """What to serve, and where."""

    model: str
    compressor: Compressor
    host: str
    port: int
    name: str | None = None
    dtype: str | None = None


def vllm_command(served: Served, settings: Settings) -> list[str]:
    """Return the command line that runs vLLM's server. The API key is not in it: see `vllm_environment`."""
    # -P: modules in the current folder are not imported.
    command = [sys.executable, "-P", "-m", "vlmzip.serving.server.vllm_process", "serve", source_of(served.model)]
    command += ["--served-model-name", served.name or served.model, "--host", served.host, "--port", str(served.port)]
    command += ["--hf-overrides", json.dumps({"vlmzip": spec.write(served.compressor)})]
    command += ["--limit-mm-per-prompt", json.dumps({"image": settings.max_images})]
    command += ["--allowed-media-domains", *(sorted(settings.allow_hosts) or [NO_HOST])]
    command += ["--middleware", MIDDLEWARE, "--shutdown-timeout", str(GRACE)]
    command += [] if settings.log_requests else ["--disable-uvicorn-access-log"]
    command += [] if served.dtype is None else ["--dtype", served.dtype]
    return command


def vllm_environment(settings: Settings, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of that command, with the API key and without redirects to other hosts."""
    key = {} if settings.api_key is None else {"VLLM_API_KEY": settings.api_key}
    return {**environment, "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0", **key}


def reason_against_vllm(model: str, compressor: Compressor) -> str | None:
    """Return why vLLM cannot serve a model with a method; `None` if it can. It needs no weights."""
    if find_spec("vllm") is None:
        return f"vLLM is not installed: {how_to_install('vllm')}"
    from vlmzip.serving.vllm.plugin import ARCHITECTURES  # it imports vLLM, which is an extra

    config = load_config(source_of(model))
    try:
        check_model(config, compressor, ARCHITECTURES, version("vllm"))
    except UserError as error:
        return str(error)
    return None


def choose_engine(engine: str, model: str, compressor: Compressor) -> str:
    """Return "hf" or "vllm". `engine` is "auto" or one of both. Raise `UserError` if vLLM is asked for and cannot."""
    if engine == "hf":
        return "hf"
    against = reason_against_vllm(model, compressor)
    if engine == "vllm" and against is not None:
        raise UserError(f"--engine vllm: {against}")
    return "hf" if against is not None else "vllm"
