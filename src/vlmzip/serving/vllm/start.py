"""The check when vLLM starts: read the compressor, and refuse what cannot run, before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from vlmzip import catalogue, spec
from vlmzip.compressor import Compressor
from vlmzip.compressor_file import read_compressor
from vlmzip.errors import UserError
from vlmzip.files import is_file, is_folder
from vlmzip.outline import FILE
from vlmzip.serving.vllm import setting
from vlmzip.serving.vllm.setting import KEY

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
    compressor = configured(model_config)
    if compressor is None:
        return
    check_version(version)
    names = getattr(hf_config, "architectures", None) or []
    if not any(name in architectures for name in names):
        raise UserError(
            f"vlmzip's plugin for vLLM does not have {', '.join(names) or 'this architecture'}; it has"
            f" {', '.join(sorted(architectures))}. Start without {KEY} and without {FILE}, or use `vlmzip serve`"
        )
    if model_config.model_impl not in OWN_CLASSES:
        raise UserError(
            f"vlmzip's plugin needs vLLM's own model class, got model_impl={model_config.model_impl!r}: leave it out"
        )
    setting.check(compressor, next((TRAITS[name] for name in names if name in TRAITS), setting.DEFAULT))
    setattr(hf_config, KEY, spec.write(compressor))
    setattr(model_config, CHECKED, True)


def configured(model_config: Any) -> Compressor | None:
    """Return the compressor of `--hf-overrides`, else of the checkpoint's config, else of its `compressor.json`."""
    overrides = model_config.hf_overrides
    if isinstance(overrides, dict) and KEY in overrides:
        return spec.as_compressor(overrides[KEY])
    if (text := getattr(model_config.hf_config, KEY, None)) is not None:
        return spec.read_named(str(text), catalogue.available())
    folder = folder_with_compressor(model_config.model, model_config.revision)
    return None if folder is None else read_compressor(folder)


def folder_with_compressor(model: str, revision: str | None) -> Path | None:
    """Return the folder of the checkpoint if it has a `compressor.json`."""
    if is_folder(Path(model)):
        return Path(model) if is_file(Path(model) / FILE) else None
    file = cached_file(
        model,
        FILE,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if file is None else Path(file).parent
