"""Training records in LLaVA's JSON format, read one at a time from files of any size.

A file is one JSON list, or JSON Lines, of

    {"id": …, "image": "a.jpg" or ["a.jpg", …] or nothing, "conversations": [{"from": "human", "value": "<image>\\n…"},
     {"from": "gpt", "value": "…"}, …]}

with one `<image>` for each picture, anywhere in what the human says. What is no such record is counted, never used.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlmzip.errors import UserError

PLACE = "<image>"
HUMAN, MODEL = ("human", "user"), ("gpt", "assistant")
#: Bytes read at once while looking for where records begin and end.
CHUNK = 1 << 24
#: What opens, closes or hides brackets in JSON.
_MARK = re.compile(rb'(?P<text>"(?:[^"\\]|\\.)*(?P<closed>")?)|[{}\[\]]', re.DOTALL)


class BadRecord(Exception):
    """A record that cannot be trained on; the message says why, in few words that are the same for all of its kind."""


@dataclass(frozen=True)
class Turn:
    question: str
    """With `PLACE` where a picture stands."""
    answer: str


@dataclass(frozen=True)
class Record:
    """A conversation, about pictures or not."""

    id: str
    turns: tuple[Turn, ...]
    pictures: tuple[str, ...]
    """Paths, in the order of the places."""

    def load_pictures(self, folder: Path) -> list[Image.Image]:
        """The pictures in RGB. Raises `BadRecord` where one is missing or broken."""
        found = []
        for path in self.pictures:
            try:
                with Image.open(folder / path) as picture:
                    found.append(picture.convert("RGB"))
            except FileNotFoundError:
                raise BadRecord("a picture is missing") from None
            except Exception as error:  # a broken file can raise whatever its decoder thinks of
                raise BadRecord("a picture cannot be read") from error
        return found


def read_record(content: Any) -> Record:
    """Raises `BadRecord` for what is no record of LLaVA's format."""
    if not isinstance(content, dict):
        raise BadRecord("not an object")
    said = content.get("conversations")
    if not isinstance(said, list) or not said:
        raise BadRecord("no conversations")
    turns = tuple(_turns(said))
    pictures = content.get("image")
    paths = [] if pictures is None else [pictures] if isinstance(pictures, str) else pictures
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise BadRecord("image is no path and no list of paths")
    places = sum(turn.question.count(PLACE) for turn in turns)
    if places != len(paths):
        raise BadRecord(f"not as many {PLACE} as pictures")
    return Record(str(content.get("id", "")), turns, tuple(paths))


def _turns(said: Sequence[Any]) -> Iterator[Turn]:
    if len(said) % 2:
        raise BadRecord("a conversation that does not end with an answer")
    for asked, answered in zip(said[::2], said[1::2], strict=True):
        question, answer = _said(asked, HUMAN), _said(answered, MODEL)
        if PLACE in answer:
            raise BadRecord(f"an answer with {PLACE}")
        if not answer.strip():
            raise BadRecord("an empty answer")
        yield Turn(question, answer)


def _said(part: Any, who: tuple[str, ...]) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("value"), str):
        raise BadRecord("a part of the conversation without text")
    if part.get("from") not in who:
        raise BadRecord("human and gpt do not take turns")
    return part["value"]


class Records:
    """The records of a file; each is read from the disk when it is asked for.

    Records that are none are left out. `numbers` has the place in the file of each of those that are here; `bad` the
    place of each that is not, and the reason.
    """

    def __init__(self, path: Path) -> None:
        """Raises `UserError` for a file that cannot be read, that ends in the middle of a record, or that has none."""
        self.path = path
        self.bad: list[tuple[int, str]] = []
        self.numbers = array("Q")
        self._begins, self._ends, self._pictures = array("Q"), array("Q"), array("Q")
        try:
            for number, (begin, end) in enumerate(_places(path)):
                try:
                    pictures = len(read_record(self._parse(begin, end)).pictures)
                except BadRecord as reason:
                    self.bad.append((number, str(reason)))
                    continue
                for values, value in zip(self._columns(), (number, begin, end, pictures), strict=True):
                    values.append(value)
        except OSError as error:
            raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
        if not self._begins:
            raise UserError(f"{str(path)!r} has no record to train on; {len(self.bad)} are bad{self._first_bad()}")

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, number: int) -> Record:
        return read_record(self._parse(self._begins[number], self._ends[number]))

    def pictures(self, number: int) -> int:
        """How many pictures the record is about."""
        return self._pictures[number]

    def size(self, number: int) -> int:
        """Bytes of the record in the file: about how long it is."""
        return self._ends[number] - self._begins[number]

    def _columns(self) -> tuple[array, ...]:
        return self.numbers, self._begins, self._ends, self._pictures

    def _parse(self, begin: int, end: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(begin)
            text = file.read(end - begin)
        try:
            return json.loads(text)
        except ValueError:
            raise BadRecord("no JSON") from None

    def _first_bad(self) -> str:
        return f", the first (record {self.bad[0][0]}): {self.bad[0][1]}" if self.bad else ""


def _places(path: Path) -> Iterator[tuple[int, int]]:
    """Where each record begins and ends, in bytes."""
    with path.open("rb") as file:
        first = file.read(CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    return _elements(path) if first == b"[" else _lines(path)


def _lines(path: Path) -> Iterator[tuple[int, int]]:
    begin = 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield begin, begin + len(line)
            begin += len(line)


def _elements(path: Path) -> Iterator[tuple[int, int]]:
    """The objects of one JSON list, told by their brackets, so that a broken one does not take others along.

    Raises `UserError` where brackets or quotes are left open at the end of the file.
    """
    depth = begin = done = 0
    rest = b""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            text = rest + chunk
            used = len(text)
            for mark in _MARK.finditer(text):
                kind = mark.group()
                if mark["text"] is not None and mark["closed"] is None:
                    used = mark.start()  # the next chunk may close it
                    break
                if kind in b"{[":
                    depth += 1
                    if depth == 2:
                        begin = done + mark.start()
                elif kind in b"}]":
                    depth -= 1
                    if depth == 1:
                        yield begin, done + mark.end()
            rest, done = text[used:], done + used
    if depth or rest:
        raise UserError(f"{str(path)!r} ends in the middle of a record: was it cut short?")
