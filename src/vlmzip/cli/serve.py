"""`vlmzip serve`: answer requests of OpenAI's API about images with compressed visual tokens."""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vlmzip import spec
from vlmzip.cli._options.common import check_counts
from vlmzip.cli._options.serve import ENGINES, KEY, LIMITS
from vlmzip.cli._shared.loading import load
from vlmzip.cli._shared.method import check_method, make_method, without_budget
from vlmzip.cli._shared.method import settings as method_settings
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, check_choice, counted, how_to_install, telling_once
from vlmzip.mini.examples import asked
from vlmzip.serving.playground.examples import Example
from vlmzip.serving.server.log_thread import logging_in_thread
from vlmzip.serving.server.settings import Settings, is_loopback
from vlmzip.serving.server.vllm_command import Served, choose_engine, vllm_command, vllm_environment

if TYPE_CHECKING:
    from vlmzip.serving.store.reading import Store

log = logging.getLogger(__name__)


def run(args: Namespace) -> None:
    check_choice("--engine", args.engine, ENGINES)
    check_counts(args, *LIMITS)
    check_method(args)
    settings = _settings(args)
    _warn_if_open(args.host, settings)
    limits = [name for name in LIMITS if name != "max_images" and getattr(args, name) is not None]
    features: list[tuple[str, object, str]] = [
        ("the playground", args.playground, "vLLM does not say what became of each token"),
        ("--store", args.store, "vLLM does not take images from a store"),
        ("--device", args.device, "vLLM chooses the device"),
        ("--allow-pickle", args.allow_pickle, "vLLM loads the weights"),
        *((f"--{name.replace('_', '-')}", True, "vLLM has limits of its own") for name in limits),
    ]
    for feature, wanted, reason in features:
        if wanted and args.engine == "vllm":
            raise UserError(f"{feature} needs --engine hf: {reason}")
    engine = "hf" if any(wanted for _, wanted, _ in features) else args.engine
    if choose_engine(engine, args.model or "", without_budget(args)) == "vllm":
        served = Served(args.model, _for_vllm(args), args.host, args.port, args.name, args.dtype)
        command = vllm_command(served, settings)
        os.execve(command[0], command, vllm_environment(settings, os.environ))
    missing = [package for package in ("fastapi", "uvicorn", "prometheus_client") if find_spec(package) is None]
    if missing:
        raise UserError(f"serve needs {missing[0].replace('_', '-')}: {how_to_install('serve')}")
    examples = _examples(args.playground)
    from vlmzip.serving.server import run as server  # its packages are an extra

    store = _open_store(args)
    # The socket comes before the model, which takes long to load.
    with server.listen(args.host, args.port) as listening, telling_once(log.warning):
        log.info(f"loading {args.model} …")
        loaded = load(args.model, args.device, args.dtype, allow_pickle=args.allow_pickle)
        compressor = make_method(args, loaded.family.profile())
        if store is not None:
            store.attach(loaded).detach()  # an error if the store comes from another model
            compressor = compressor if _has_method(args) else store.compressor
        name = args.name or args.model

        def ready(address: str) -> None:
            images = "" if store is None else f" and {counted(len(store), 'stored image')}"
            print(f"{name} with {spec.write(compressor, label=True)}{images} at {address}/v1", flush=True)
            if examples is not None:
                print(f"playground at {address}/playground", flush=True)

        with logging_in_thread() as log_thread:
            lived = server.run(loaded, compressor, settings, listening, name, ready, examples, store)
    if log_thread.stuck:  # it holds the lock of stderr, and Python's own end would fail at that
        os._exit(0 if lived else 1)
    if not lived:
        sys.exit(1)


def _examples(playground: bool | None) -> list[Example] | None:
    """Return the examples of the playground, or `None` for a server without it. By default Gradio decides."""
    installed = find_spec("gradio") is not None
    if playground and not installed:
        raise UserError(f"the playground needs Gradio: {how_to_install('playground')}")
    if not (installed if playground is None else playground):
        return None
    return [Example(image, question) for image, question in asked()]


def _open_store(args: Namespace) -> Store | None:
    """Return the store, if there is one. Model and dtype become the store's unless they are given."""
    if args.store is None:
        return None
    from vlmzip.serving.store.reading import Store  # needs pyarrow, an extra

    store = Store(args.store)
    args.model, args.dtype = args.model or store.manifest.model, args.dtype or store.manifest.dtype
    return store


def _has_method(args: Namespace) -> bool:
    """Return whether the options say how to compress images."""
    return bool(args.method_is_given or args.keep is not None or method_settings(args))


def _settings(args: Namespace) -> Settings:
    limits = {name: value for name in LIMITS if (value := getattr(args, name)) is not None}
    hosts = {host.strip().lower() for host in (args.allow_hosts or "").split(",") if host.strip()}
    for host in hosts:
        if any(letter in host for letter in "/:@ *"):
            raise UserError(f"--allow-hosts takes names such as images.example.org, got {host!r}")
    return Settings(
        host=args.host,
        api_key=_key(args.api_key_file),
        allow_hosts=frozenset(hosts),
        log_requests=not args.quiet,
        **limits,
    )


def _key(file: Path | None) -> str | None:
    """Return the API key of the file or the environment; `None` if there is none."""
    if file is None:
        key = os.environ.get(KEY)
        source = f"${KEY}"
    else:
        source = f"--api-key-file {str(file)!r}"
        try:
            key = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{source} cannot be read: {getattr(error, 'strerror', None) or 'it is not text'}"
            ) from None
    if key is None:
        return None
    if not key.strip() or not key.strip().isascii() or any(letter.isspace() for letter in key.strip()):
        raise UserError(f"{source} must have one key of ASCII letters without spaces")
    return key.strip()


def _warn_if_open(host: str, settings: Settings) -> None:
    """Warn if other machines can send requests and need no key."""
    if not is_loopback(host) and settings.api_key is None:
        log.warning(f"other machines can use this server without a key: set ${KEY}, or listen on 127.0.0.1")


def _for_vllm(args: Namespace) -> Compressor:
    """Return the method for vLLM, which gets it as text before a model is loaded."""
    method = without_budget(args)
    if args.keep is not None and "keep" not in method.field_names():
        raise UserError(f"--keep with {method.name()} needs --engine hf; give the fields of {method.name()} for vLLM")
    return method
