"""Read and write the images of commands. Results never replace an image that they are about."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vlmzip.errors import UserError
from vlmzip.files import refuse_source, write_whole
from vlmzip.runtime.images import load_image as load_image


def check_target(path: Path, sources: list[str]) -> None:
    """Raise `UserError` if a result would replace one of its `sources` or its suffix is not an image format's."""
    refuse_source(path, sources)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{str(path)!r} has no suffix of an image format; try {path.stem}.png")


def save_image(image: Image.Image, path: Path, sources: list[str]) -> None:
    """Write an image whole or not at all, in the format of the suffix. Raise `UserError` as `check_target` does."""
    check_target(path, sources)
    write_whole(path, image.save)
