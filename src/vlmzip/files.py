"""Test and write paths that users give. A result is written completely or not at all, never over one of its sources."""

from __future__ import annotations

import csv
import io
import os
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vlmzip.errors import UserError

#: A path, or any other text that a user gives where a path is possible.
PathText = str | os.PathLike[str]


# `Path.is_file` and the like raise an error for a text that is too long for a file name; these functions never do.


def is_file(path: PathText) -> bool:
    """Return whether `path`, which may be any text, is a file."""
    return os.path.isfile(path)


def is_folder(path: PathText) -> bool:
    """Return whether `path`, which may be any text, is a folder."""
    return os.path.isdir(path)


def is_there(path: PathText) -> bool:
    """Return whether `path`, which may be any text, exists."""
    return os.path.exists(path)


def open_to_read(path: PathText) -> io.BufferedReader:
    """Open a file or a pipe. Raise `OSError` for a device: some, such as /dev/zero, never end."""
    if is_there(path) and not (is_file(path) or is_folder(path) or stat.S_ISFIFO(os.stat(path).st_mode)):
        raise OSError("it is a device, not a file")
    try:
        return open(path, "rb")
    except ValueError as error:  # a zero byte in the name
        raise OSError(str(error)) from None


def refuse_place(path: Path, option: str = "") -> None:
    """Raise `UserError` for a path that cannot be written: a name that is too long, or a broken link."""
    name = f"{option} {str(path)!r}".lstrip()
    try:
        os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise UserError(f"{name} is a broken link; give another name") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{name} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def refuse_source(path: Path, sources: list[str]) -> None:
    """Raise `UserError` if a result must not be written to `path`: a folder, or one of the input files `sources`."""
    refuse_place(path)
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; give the result a name inside it")
    if any(path.exists() and is_there(source) and path.samefile(source) for source in sources):
        raise UserError(f"{str(path)!r} is one of the images asked about; choose another name for the result")


def replace_whole(path: Path, write: Callable[[str], object]) -> None:
    """Write a file atomically: `write` fills a temporary file, which then replaces `path`. Errors of `write` pass."""
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}-", suffix=path.suffix)
    os.close(handle)
    try:
        write(unfinished)
        Path(unfinished).chmod(0o644)
        Path(unfinished).replace(path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """Make the folder of `path` if needed and write the file by `replace_whole`. Raise `UserError` on disk errors."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, write)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8 by `write_whole`."""
    write_whole(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write a table with a column for each key of the first row. All rows must have the same keys."""

    def fill(name: str) -> None:
        with Path(name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, fill)
