"""The check when vLLM starts: read the compressor, and refuse what cannot run, before any weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from vlmzip import catalogue, spec
from vlmzip.compressor import Compressor
from vlmzip.compressor_file import read_compressor
from vlmzip.errors import UserError
from vlmzip.files import is_file, is_folder
from vlmzip.outline import FILE
from vlmzip.serving.vllm import setting
from vlmzip.serving.vllm.setting import KEY

log = logging.getLogger(__name__)

#: The versions of vLLM that the plugin was checked on.
VERSIONS = ("0.32", "0.33")
#: Values of `model_impl` with which vLLM runs its own model classes.
OWN_CLASSES = ("auto", "vllm")
#: A mark on vLLM's config of a model whose compressor was checked. A checkpoint cannot set it.
CHECKED = "vlmzip_is_checked"
#: The traits of architectures that differ from LLaVA's.
TRAITS = {
    "Qwen2_5_VLForConditionalGeneration": setting.PATCHES,
    "Qwen3VLForConditionalGeneration": setting.PATCHES,
}


def is_known(version: str) -> bool:
    """Return whether the plugin was checked on a version of vLLM."""
    return ".".join(version.split(".")[:2]) in VERSIONS


def check_version(version: str) -> None:
    """Raise `UserError` for a version of vLLM that the plugin was not checked on."""
    if not is_known(version):
        raise UserError(
            f"vlmzip's plugin works with vLLM {' and '.join(VERSIONS)}, and this is {version}: install one of them, or"
            f" start without {KEY}"
        )


def resolve(model_config: Any, architectures: Mapping[str, str], version: str) -> None:
    """Replace the setting in the config of a model by its canonical spec. Do nothing if there is no setting.

    `model_config` is vLLM's `ModelConfig`, and `architectures` are those with a class of the plugin. Raise `UserError`
    if the compressor cannot run.
    """
    hf_config = model_config.hf_config
    if getattr(hf_config, "vision_config", None) is None and not hasattr(hf_config, KEY):
        return  # vLLM also asks for the LLM's part of the config
    if hasattr(model_config, CHECKED):
        return  # the copy for the LLM, which has another architecture
    compressor = configured(model_config, architectures)
    if compressor is None:
        return
    check_model(hf_config, compressor, architectures, version)
    if model_config.model_impl not in OWN_CLASSES:
        raise UserError(
            f"vlmzip's plugin needs vLLM's own model class, got model_impl={model_config.model_impl!r}: leave it out"
        )
    setattr(hf_config, KEY, spec.write(compressor))
    setattr(model_config, CHECKED, True)


def check_model(
    config: PreTrainedConfig, compressor: Compressor, architectures: Mapping[str, str], version: str
) -> None:
    """Raise `UserError` with the reason if vLLM cannot run a compressor in a model with this config.

    It needs no weights. It imports the plugin's class of the model, as vLLM does next.
    """
    check_version(version)
    if (name := known_architecture(config, architectures)) is None:
        names = getattr(config, "architectures", None) or ["this architecture"]
        raise UserError(
            f"vlmzip's plugin for vLLM does not have {', '.join(names)}; it has {', '.join(sorted(architectures))}."
            f" Start without {KEY} and without {FILE}, or use `vlmzip serve --engine hf`"
        )
    setting.check(compressor, TRAITS.get(name, setting.DEFAULT))
    module, _, class_name = architectures[name].partition(":")
    getattr(import_module(module), class_name).family_class(config)  # it refuses vision encoders that it does not know


def known_architecture(config: PreTrainedConfig, architectures: Mapping[str, str]) -> str | None:
    """Return the first architecture of a config that the plugin has a class for."""
    names = getattr(config, "architectures", None) or []
    return next((name for name in names if name in architectures), None)


def configured(model_config: Any, architectures: Mapping[str, str]) -> Compressor | None:
    """Return the compressor of `--hf-overrides`, else of the checkpoint's config, else of its `compressor.json`.

    The Hub is asked for that file only if the plugin has the architecture.
    """
    overrides = model_config.hf_overrides
    if isinstance(overrides, dict) and KEY in overrides:
        return spec.as_compressor(overrides[KEY])
    if (text := getattr(model_config.hf_config, KEY, None)) is not None:
        return spec.read_named(str(text), catalogue.available())
    if not is_folder(model_config.model) and known_architecture(model_config.hf_config, architectures) is None:
        return None
    folder = folder_with_compressor(model_config.model, model_config.revision)
    return None if folder is None else read_compressor(folder)


def folder_with_compressor(model: str, revision: str | None) -> Path | None:
    """Return the folder of the checkpoint if it has a `compressor.json`."""
    if is_folder(Path(model)):
        return Path(model) if is_file(Path(model) / FILE) else None
    try:
        file = cached_file(
            model,
            FILE,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except (OSError, ValueError) as error:  # vLLM also loads from places that the Hub does not know
        log.warning(
            "vlmzip does not find a %s of %r and does not compress: %s", FILE, model, str(error).partition("\n")[0]
        )
        return None
    return None if file is None else Path(file).parent
