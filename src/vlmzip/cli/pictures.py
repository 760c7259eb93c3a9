"""Pictures that commands read and write; a result is never written over a picture that was asked about."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from PIL import Image

from vlmzip.errors import UserError
from vlmzip.runtime.pictures import load_picture as load_picture


def check_target(path: Path, sources: list[str]) -> None:
    """Raises `UserError` for a result that would replace one of its `sources`, or whose format is unknown."""
    if any(path.exists() and Path(source).exists() and path.samefile(source) for source in sources):
        raise UserError(f"{str(path)!r} is one of the pictures asked about; choose another name for the result")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{str(path)!r} has no suffix of a picture format; try {path.stem}.png")


def save_picture(picture: Image.Image, path: Path, sources: list[str]) -> None:
    """Writes PNG, JPEG or whatever the suffix says: whole or not at all, and never over one of its `sources`."""
    check_target(path, sources)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
        os.close(handle)
        try:
            picture.save(unfinished)
            Path(unfinished).chmod(0o644)
            Path(unfinished).replace(path)
        finally:
            Path(unfinished).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror or error}") from None
