"""Records: one line of JSON per answered question. An interrupted run continues at the end of its files.

Lines are only ever appended, a batch at a time, and each process has a separate file. A last line without a line break
was cut short by a kill or a full disk: it is ignored, and the process that continues the file removes it. Any other
invalid line is an error with its file and number."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

from vlmzip.errors import UserError
from vlmzip.json_text import JsonError, Line, parse, read_lines, write_line
from vlmzip.locks import cannot_write

Record = dict[str, Any]
#: The keys that every record has.
KEYS = {"task", "sample", "image", "question", "answers", "given", "score", "compressor", "visual_tokens_by_layer"}


def read_records(paths: Iterable[Path], names: Collection[str] = ()) -> dict[str, Record]:
    """Return the records of several files of one configuration, by sample.

    Records must have `names` in addition to `KEYS`. Raise `UserError` with file and line for an invalid record or a
    second record of a sample.
    """
    records: dict[str, Record] = {}
    for path in paths:
        for line in read_lines(path):
            if not line.is_whole:
                continue
            record = _record(path, line, {*KEYS, *names})
            if record["sample"] in records:
                _refuse(path, line.number, f"the sample {record['sample']!r} has a record before this one")
            records[record["sample"]] = record
    return records


def _record(path: Path, line: Line, names: set[str]) -> Record:
    number = line.number
    try:
        record = parse(line.text)
    except JsonError as error:
        _refuse(path, number, f"it cannot be read as JSON ({error})")
    if missing := names - set(record if isinstance(record, dict) else ()):
        _refuse(path, number, "it lacks " + ", ".join(sorted(missing)))
    for name, (fits, kind) in _VALUES.items():
        if name in record and not fits(record[name]):
            _refuse(path, number, f"its {name} is {kind}, not {json.dumps(record[name])[:40]}")
    return record


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_number(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float)


def is_share(value: object) -> bool:
    return is_number(value) and 0 <= value <= 1


def is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def is_list(value: object, fits: Callable[[object], bool]) -> bool:
    """Return whether a value is a non-empty list whose items all fit."""
    return isinstance(value, list) and bool(value) and all(map(fits, value))


def _are_texts(value: object) -> bool:
    return isinstance(value, dict) and all(map(is_text, value.values()))


#: The valid values of a record's fields, and their description for messages.
_VALUES: dict[str, tuple[Callable[[object], bool], str]] = {
    **dict.fromkeys(
        ("task", "sample", "image", "question", "given", "method", "device", "vlmzip", "commit"), (is_text, "a text")
    ),
    **dict.fromkeys(("visual_tokens", "text_tokens", "prefill_flops"), (is_count, "a whole number from 0")),
    "answers": (lambda value: is_list(value, is_text), "a list of texts"),
    "score": (is_share, "a number from 0 to 1"),
    "retention": (lambda value: is_number(value) and value >= 0, "a number from 0"),
    "compressor": (lambda value: isinstance(value, dict), "an object"),
    "beyond_positions": (lambda value: isinstance(value, bool), "true or false"),
    "groups": (_are_texts, "an object of texts"),
    "visual_tokens_by_layer": (lambda value: is_list(value, is_count), "a list of whole numbers from 0"),
}


def _refuse(path: Path, number: int, reason: str) -> NoReturn:
    raise UserError(
        f"{path}:{number} is not a record of this run: {reason}; delete the line and run the same command again:"
        " its question will be asked again, all other records are kept"
    )


class Shard:
    """The file to which one process appends its records. The process holds the folder, see `hold`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise cannot_write(path, error) from None
        try:
            self._end = _end_of_whole_lines(path)
            os.ftruncate(self._file, self._end)
        except BaseException:
            self.close()
            raise

    def append(self, records: Sequence[Record]) -> None:
        """Write the records, and wait until they are on disk. Raise `UserError` if that fails."""
        rest = "".join(map(write_line, records)).encode()
        size = len(rest)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise cannot_write(self.path, error) from None
        self._end += size

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _end_of_whole_lines(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1
