"""Results on disk: whole or not at all, and never over what they were made from."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from vlmzip.errors import UserError


def refuse_source(path: Path, sources: list[str]) -> None:
    """Raises `UserError` for a result that would replace one of its `sources`, or that is a folder."""
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; give the result a name inside it")
    if any(path.exists() and Path(source).exists() and path.samefile(source) for source in sources):
        raise UserError(f"{str(path)!r} is one of the pictures asked about; choose another name for the result")


def replace_whole(path: Path, write: Callable[[str], object]) -> None:
    """Has `write` fill a file beside `path`, which takes the name only when it is whole. Raises what `write` raises."""
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
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
