"""Images that commands read and write; a result is never written over an image that was asked about."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vlmzip.errors import UserError
from vlmzip.files import refuse_source, write_whole
from vlmzip.runtime.images import load_image as load_image


def check_target(path: Path, sources: list[str]) -> None:
    """Raises `UserError` for a result that would replace one of its `sources`, or whose format is unknown."""
    refuse_source(path, sources)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{str(path)!r} has no suffix of an image format; try {path.stem}.png")


def save_image(image: Image.Image, path: Path, sources: list[str]) -> None:
    """Writes PNG, JPEG or whatever the suffix says: whole or not at all, and never over one of its `sources`."""
    check_target(path, sources)
    write_whole(path, image.save)
