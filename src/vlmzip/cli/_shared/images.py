"""Check and write the images of commands. Results never replace an image that they are about."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vlmzip.errors import UserError
from vlmzip.files import refuse_source, write_whole
from vlmzip.runtime.images import load_image as load_image
from vlmzip.runtime.videos import check_video, is_video


def check_target(path: Path, sources: list[str]) -> None:
    """Raise `UserError` if a result would replace one of its `sources` or its suffix is not an image format's."""
    refuse_source(path, sources)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise UserError(f"{str(path)!r} has no suffix of an image format; try {path.stem}.png")


def save_image(image: Image.Image, path: Path, sources: list[str]) -> None:
    """Write an image whole or not at all, in the format of the suffix. Raise `UserError` as `check_target` does."""
    check_target(path, sources)
    write_whole(path, image.save)


def check_visuals(paths: list[str], frames: int | None) -> None:
    """Raise `UserError` for an image or video that cannot be read, and for `--frames` without a video."""
    if frames is not None and not any(map(is_video, paths)):
        raise UserError("--frames is the number of frames of a video, and there is only an image")
    for path in paths:
        check_video(path) if is_video(path) else load_image(path)
