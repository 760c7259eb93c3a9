"""`compressor.json`: a compressor saved as data with a model's weights. Code in a saved folder is never executed."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vlmzip import catalogue
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, closest
from vlmzip.files import is_file, is_folder, replace_whole
from vlmzip.json_text import read_json
from vlmzip.outline import FILE
from vlmzip.version import __version__

#: The version of the file's layout. Increase it if older versions of vlmzip would misread the file.
FORMAT = 1
#: The file's keys; `vlmzip` is the version that wrote it.
KEYS = ("format", "vlmzip", "method", "fields")


class NotInstalled(UserError):
    """A saved compressor's class is not installed."""


def write_compressor(compressor: Compressor, folder: str | os.PathLike[str]) -> None:
    """Write `compressor.json` completely or not at all."""
    settings = compressor.to_dict()
    content = {"format": FORMAT, "vlmzip": __version__, "method": settings.pop("method"), "fields": settings}

    def fill(name: str) -> None:
        with Path(name).open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)

    replace_whole(Path(folder) / FILE, fill)


def refuse_lora(folder: Path) -> None:
    """Raise `UserError` for a folder that has LoRA weights without their model."""
    if is_file(folder / "adapter_config.json"):
        raise UserError(
            f"{str(folder)!r} has LoRA weights without a model; load them with peft.PeftModel.from_pretrained onto the"
            " model that was trained: vlmzip.attach(model, compressor), or the plain model that you attach to later"
        )


def read_compressor(folder: str | os.PathLike[str], known: type[Compressor] | None = None) -> Compressor:
    """Return the compressor saved in `folder`. Its class must be an installed method; no other code is imported.

    `known` is a class that the caller has already imported, and which is therefore allowed, too.
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
                f" to use it, give --method {name}, or vlmzip.from_pretrained(folder, compressor=…) in Python"
            )
        return installed.get(name) or catalogue.find(name)

    return catalogue.from_dict({"method": method, **settings}, find)


def _read_file(path: Path) -> tuple[str, dict[str, object]]:
    """Return the method and its fields. Raise `UserError` for invalid content or a file of a newer vlmzip."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{str(path)!r} cannot be read: it must be a JSON object with {', '.join(KEYS)}")
    version, method, settings = content.get("format"), content.get("method"), content.get("fields")
    if type(version) is int and version > FORMAT:
        raise UserError(
            f"{str(path)!r} was written by vlmzip {content.get('vlmzip')}, newer than {__version__}; update vlmzip"
        )
    if unknown := [name for name in content if name not in KEYS]:
        raise UserError(f"{str(path)!r} has an unknown key {unknown[0]!r}{closest(unknown[0], KEYS)}")
    if missing := [name for name in ("format", "method", "fields") if name not in content]:
        raise UserError(f"{str(path)!r} cannot be read: it lacks {missing[0]}")
    if type(version) is not int or version < 1:
        raise UserError(f"{str(path)!r} cannot be read: format must be a whole number from 1 to {FORMAT}")
    if not isinstance(method, str):
        raise UserError(f"{str(path)!r} cannot be read: method must be a text")
    if not isinstance(settings, dict) or "method" in settings:
        raise UserError(
            f'{str(path)!r} cannot be read: `fields` must be a JSON object and must not contain a key "method"'
        )
    return method, settings
