"""The images of a folder, by their paths below it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from PIL import Image

from vlmzip.errors import UserError
from vlmzip.files import is_folder


def image_names(folder: Path) -> list[str]:
    """Return the paths below `folder` of all files with the suffix of an image, sorted. Hidden files are left out.

    Raise `UserError` if there are none, or if a name is not UTF-8.
    """
    if not is_folder(folder):
        raise UserError(f"there is no folder {str(folder)!r}; give a folder of images")
    known = Image.registered_extensions()
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix.lower() in known and not path.name.startswith(".") and path.is_file()
    )
    if not names:
        raise UserError(f"there are no images in {str(folder)!r}")
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"the name {name!r} is not UTF-8; rename the file") from None
    return names


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
