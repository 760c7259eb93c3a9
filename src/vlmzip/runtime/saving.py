"""`compressor.json`: the compressor beside the weights, as data; nothing in a saved folder is ever executed."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from vlmzip import catalogue
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, closest
from vlmzip.files import is_file, is_folder, replace_whole
from vlmzip.json_text import read_json
from vlmzip.runtime.resample import read_weights
from vlmzip.spec import FILE
from vlmzip.version import __version__

if TYPE_CHECKING:
    from vlmzip.runtime.facade import CompressedModel

#: Raised when the file's layout changes in a way that older versions would misread.
FORMAT = 1
#: What the file has; vlmzip is the version that wrote it.
KEYS = ("format", "vlmzip", "method", "fields")


class NotInstalled(UserError):
    """A saved compressor is of a class that is not known here."""


def from_pretrained(
    folder: str | os.PathLike[str], compressor: Compressor | None = None, **kwargs: Any
) -> CompressedModel:
    """Loads what `save_pretrained` wrote: the model with its compressor. `kwargs` go to transformers.

    `compressor` replaces the saved one. The weights of a method that has some come from `resampler.safetensors`. Raises
    `UserError` for a folder without `compressor.json`, an unknown method or field, weights that are missing or do not
    fit, or a file that a newer vlmzip wrote.
    """
    from vlmzip.runtime.checkpoints import load_model

    compressor = compressor or read_compressor(folder)
    _check_model(Path(folder))
    return reattach(load_model(folder, **kwargs), compressor, folder)


def reattach(model: nn.Module, compressor: Compressor, folder: str | os.PathLike[str]) -> CompressedModel:
    """`attach` for a compressor saved in `folder`, with the weights that it may have there."""
    from vlmzip.runtime.facade import CompressedModel

    compressed = CompressedModel(model, compressor)
    if compressed.resampler is not None:
        read_weights(compressed.resampler, folder)
    return compressed


def attach_saved(
    model: nn.Module, compressor: Compressor, folder: str | os.PathLike[str]
) -> tuple[CompressedModel, list[str]]:
    """`attach`, with the weights in `folder` if it is the compressor saved there; and what it warns of."""
    from vlmzip.runtime.facade import attach

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        compressed = reattach(model, compressor, folder) if _is_saved(compressor, folder) else attach(model, compressor)
    return compressed, [str(warning.message) for warning in said]


def _is_saved(compressor: Compressor, folder: str | os.PathLike[str]) -> bool:
    if not is_file(Path(folder) / FILE):
        return False
    try:
        return read_compressor(folder, type(compressor)) == compressor
    except NotInstalled:  # another one's
        return False


def write_compressor(compressor: Compressor, folder: str | os.PathLike[str]) -> None:
    """Writes `compressor.json` whole or not at all."""
    settings = compressor.to_dict()
    content = {"format": FORMAT, "vlmzip": __version__, "method": settings.pop("method"), "fields": settings}

    def fill(name: str) -> None:
        with Path(name).open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)

    replace_whole(Path(folder) / FILE, fill)


def _check_model(folder: Path) -> None:
    """Raises `UserError` for a folder without a model; a path that is no folder may be a hub id."""
    if is_folder(folder) and not is_file(folder / "config.json"):
        refuse_lora(folder)
        raise UserError(f"{str(folder)!r} holds no model (config.json is missing)")


def refuse_lora(folder: Path) -> None:
    """Raises `UserError` for a folder of LoRA weights without the model that they change."""
    if is_file(folder / "adapter_config.json"):
        raise UserError(
            f"{str(folder)!r} holds a LoRA alone: load it with peft.PeftModel.from_pretrained, onto what it was trained"
            " around: vlmzip.attach(model, compressor), or the plain model that is attached to afterwards"
        )


def read_compressor(folder: str | os.PathLike[str], known: type[Compressor] | None = None) -> Compressor:
    """The compressor saved in `folder`; only methods that are installed here are found, none is imported by name.

    `known` is one that the caller has already.
    """
    path = Path(folder) / FILE
    if not is_file(path):
        refuse_lora(path.parent)
        if is_file(path.parent / "training_args.bin"):
            raise UserError(
                f"there is no {FILE} in {str(folder)!r}: a Trainer wrote weights alone;"
                " write the whole model with trainer.model.save_pretrained(folder)"
            )
        lacking = f"{FILE} in" if is_folder(path.parent) else "folder"
        where = f"there is no {lacking} {str(folder)!r}"
        raise UserError(f"{where}; give compressor=…, or load the model with transformers and vlmzip.attach()")
    method, settings = _read_file(path)
    classes = [*catalogue.available().values(), *([known] if known else [])]
    installed = {f"{cls.__module__}:{cls.__qualname__}": cls for cls in classes}

    def find(name: str) -> type[Compressor]:
        if ":" in name and name not in installed:
            raise NotInstalled(
                f"{str(path)!r} names code that is not an installed method ({name});"
                f" give it yourself: --method {name}, or vlmzip.from_pretrained(folder, compressor=…) in Python"
            )
        return installed.get(name) or catalogue.find(name)

    return catalogue.from_dict({"method": method, **settings}, find)


def _read_file(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the method and its fields. Raises `UserError` for a file of a newer vlmzip, or that nobody wrote so."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} cannot be read: it must be a JSON object with {', '.join(KEYS)}")
    version, method, settings = content.get("format"), content.get("method"), content.get("fields")
    if type(version) is int and version > FORMAT:
        raise UserError(
            f"{str(path)!r} was written by vlmzip {content.get('vlmzip')}, newer than {__version__}: update vlmzip"
        )
    if unknown := [name for name in content if name not in KEYS]:
        raise UserError(f"{str(path)!r} has no place for {unknown[0]!r}{closest(unknown[0], KEYS)}")
    if missing := [name for name in ("format", "method", "fields") if name not in content]:
        raise UserError(f"{str(path)!r} cannot be read: it lacks {missing[0]}")
    if type(version) is not int or version < 1:
        raise UserError(f"{str(path)!r} cannot be read: format must be a whole number from 1 to {FORMAT}")
    if not isinstance(method, str):
        raise UserError(f"{str(path)!r} cannot be read: method must be a text")
    if not isinstance(settings, dict) or "method" in settings:
        raise UserError(f"{str(path)!r} cannot be read: fields must be an object, and method no field of it")
    return method, settings
