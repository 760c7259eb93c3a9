"""The images of a folder, by their paths below it."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from PIL import Image

from vlmzip.errors import UserError, alternatives
from vlmzip.files import is_file, is_folder
from vlmzip.runtime.images import COMMON_FORMATS, ImageError, check_file, common_suffixes, decode, shortened

log = logging.getLogger(__name__)


def image_names(folder: Path) -> list[str]:
    """Return the paths below `folder` of all files with the suffix of a common format, sorted.

    Hidden files and folders are left out, and so are folders behind links. Images of other formats are, too, with a
    note. Raise `UserError` if there are no images, or if a name is not UTF-8.
    """
    if not is_folder(folder):
        what = f"{str(folder)!r} is a file" if is_file(folder) else f"there is no folder {str(folder)!r}"
        raise UserError(f"{what}; give a folder of images")
    known, common = Image.registered_extensions(), common_suffixes()
    names: list[str] = []
    others: list[str] = []
    for path in folder.rglob("*"):
        below, suffix = path.relative_to(folder), path.suffix.lower()
        is_there = path.is_file() or (path.is_symlink() and not path.exists())  # reading says what is wrong with a link
        if suffix in known and not any(part.startswith(".") for part in below.parts) and is_there:
            (names if suffix in common else others).append(below.as_posix())
    if not names:
        raise UserError(f"there are no images in {str(folder)!r}; give {alternatives(COMMON_FORMATS)} files")
    if others:
        log.warning(f"encode takes {alternatives(COMMON_FORMATS)} files; others are left out, such as {min(others)!r}")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"the name {name!r} is not UTF-8; rename the file") from None
    return sorted(names)


def refuse_place(folder: Path, store: Path, description: str) -> None:
    """Raise `UserError` if a store would put its files beside the images, around them, or beside other files.

    `description` is the name of the file that each store has.
    """
    if folder.resolve().is_relative_to(store.resolve()):
        raise UserError(
            f"--out {str(store)!r} has the images in it, and a store needs its own folder; give another one"
        )
    is_new = is_folder(store) and not is_file(store / description)
    others = [path.name for path in store.iterdir() if not path.name.startswith(".")] if is_new else []
    if others:
        raise UserError(f"--out {str(store)!r} is no store, and it has {min(others)[:100]!r} in it; give a new folder")


def read_image(folder: Path, name: str) -> tuple[Image.Image, dict[str, Any]]:
    """Return an image, and the columns of the index that describe its file. Raise `ImageError` if it cannot be read.

    The file is read once, because another program may change it.
    """
    path, shown = folder / name, repr(shortened(name))
    check_file(path, shown)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{shown} cannot be read: {error.strerror or error}") from None
    image = decode(content, shown, COMMON_FORMATS)
    size = {"width": image.width, "height": image.height}
    return image, {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), **size}


def has_changed(path: Path, size: int, sha256: str) -> bool:
    """Return whether a file has other bytes than those of this size and SHA-256. Raise `UserError` on disk errors."""
    try:
        with path.open("rb") as file:
            same_size = os.fstat(file.fileno()).st_size == size
            return not same_size or hashlib.file_digest(file, "sha256").hexdigest() != sha256
    except OSError as error:
        raise UserError(f"{str(path)!r} cannot be read: {error.strerror or error}") from None
