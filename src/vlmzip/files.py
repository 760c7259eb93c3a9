"""Files and folders by any text that a user gives; results whole or not at all, and never over their sources."""

from __future__ import annotations

import csv
import io
import os
import stat
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vlmzip.errors import UserError

#: What users write where a path may stand: a path, or any other text.
PathText = str | os.PathLike[str]


# `Path.is_file` and its like raise an error for a text that is longer than a name may be; these functions never do.


def is_file(path: PathText) -> bool:
    """Return whether there is a file at `path`, which may be any text."""
    return os.path.isfile(path)


def is_folder(path: PathText) -> bool:
    """Return whether there is a folder at `path`, which may be any text."""
    return os.path.isdir(path)


def is_there(path: PathText) -> bool:
    """Return whether there is anything at `path`, which may be any text."""
    return os.path.exists(path)


def open_to_read(path: PathText) -> io.BufferedReader:
    """Open a file or a pipe. Raise `OSError` for a device, such as /dev/zero, which never ends."""
    if is_there(path) and not (is_file(path) or is_folder(path) or stat.S_ISFIFO(os.stat(path).st_mode)):
        raise OSError("it is a device, not a file")
    try:
        return open(path, "rb")
    except ValueError as error:  # a zero byte in the name
        raise OSError(str(error)) from None


def refuse_place(path: Path, option: str = "") -> None:
    """Raise `UserError` for a path at which nothing can be written: its name is too long, or its links end nowhere."""
    said = f"{option} {str(path)!r}".lstrip()
    try:
        os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise UserError(f"{said} is a link that leads nowhere; give another name") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{said} cannot be written: {getattr(error, 'strerror', None) or error}") from None


def refuse_source(path: Path, sources: list[str]) -> None:
    """Raises `UserError` for a result that would replace one of its `sources`, or that is a folder."""
    refuse_place(path)
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; give the result a name inside it")
    if any(path.exists() and is_there(source) and path.samefile(source) for source in sources):
        raise UserError(f"{str(path)!r} is one of the images asked about; choose another name for the result")


def replace_whole(path: Path, write: Callable[[str], object]) -> None:
    """Has `write` fill a file beside `path`, which takes the name only when it is whole. Raises what `write` raises."""
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:40]}-", suffix=path.suffix)
    os.close(handle)
    try:
        write(unfinished)
        Path(unfinished).chmod(0o644)
        Path(unfinished).replace(path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[str], object]) -> None:
    """`replace_whole`, in a folder that need not be there yet. Raises `UserError` where the disk refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, write)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """`write_whole` of a text, in UTF-8."""
    write_whole(path, lambda name: Path(name).write_text(text, encoding="utf-8"))


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Writes a table: a column for each key of the first row, which every row has."""

    def fill(name: str) -> None:
        with Path(name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    write_whole(path, fill)
