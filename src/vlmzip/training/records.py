"""Training records in LLaVA's JSON format, read one at a time from files of any size.

A file is a JSON list, or JSON Lines, of records

    {"id": …, "image": "a.jpg" or ["a.jpg", …] or nothing, "conversations": [{"from": "human", "value": "<image>\\n…"},
     {"from": "gpt", "value": "…"}, …]}

with one `<image>` per image, anywhere in the human turns. `images` is another name for `image`. A record can have one
video, with one `<video>` in the text: `"video": "clip.mp4"`, `"video": "frames"` (a folder of its frames) or
`"video": ["1.jpg", "2.jpg", …]` (a list of them). Anything else is counted as a bad record and not used.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeGuard

from PIL import Image

from vlmzip.errors import UserError
from vlmzip.json_text import JsonError, open_json, parse, read_lines
from vlmzip.runtime.images import ImageError, load_image
from vlmzip.runtime.videos import USUAL_FRAMES, Choose, Clip, check_memory, is_video, read_clip

PLACE, VIDEO = "<image>", "<video>"
HUMAN, MODEL = ("human", "user"), ("gpt", "assistant")
#: Frames per second of videos that are given as frames: as many as Qwen's processors take from a video file.
RATE = 2.0
#: Kinds of videos in the index of records; 0 stands for no video.
FRAMES, VIDEO_FILE = 1, 2
#: The most digits of a number in the name of a frame.
LONGEST_NUMBER = 20
#: Bytes to read at once while searching for the beginnings and ends of records.
CHUNK = 1 << 20
#: The longest record of a list, in bytes. One that seems to be longer has an unclosed bracket or quote.
LONGEST = 1 << 24


class BadRecord(Exception):
    """A record that cannot be trained on. The message is a short reason, the same text for all records of one kind."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    """The question, with `PLACE` in the place of each image and `VIDEO` in the place of the video."""
    answer: str


@dataclass(frozen=True)
class TrainingRecord:
    """A conversation, with or without images and a video."""

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    """Paths, in the order of the `PLACE`s."""
    video: str | tuple[str, ...] | None = None
    """The paths of the frames of the video, or the path of a video file or of a folder of frames."""

    @property
    def listed(self) -> int:
        """Return the number of images and of frames: `USUAL_FRAMES` for a video whose frames are not listed."""
        frames = USUAL_FRAMES if isinstance(self.video, str) else len(self.video or ())
        return len(self.images) + frames

    def load_images(self, folder: Path) -> list[Image.Image]:
        """Return the images, read as in every command. Raise `BadRecord` if one is missing or broken."""
        return _load_images(folder, self.images)

    def load_video(self, folder: Path, choose: Choose) -> Clip:
        """Return the chosen frames of the video. Frames without times are `RATE` a second.

        `choose` gets no rate for a folder of frames or a list of them; all frames of a list are chosen. Raise
        `BadRecord` if the video or one of its frames is missing or broken, or if the frames take too much memory.
        """
        if isinstance(self.video, str) and is_video(self.video):
            with _bad_videos():
                return read_clip(folder / self.video, choose)
        paths = _frames_in(folder, self.video) if isinstance(self.video, str) else list(self.video or ())
        numbers = list(choose(len(paths), None))
        (first,) = _load_images(folder, [paths[numbers[0]]])
        with _bad_videos():
            check_memory(str(self.video), len(numbers), first.size)
        frames = _load_images(folder, [paths[number] for number in numbers])
        return Clip(str(self.video), frames, numbers, len(paths), RATE)

    @property
    def images_before_video(self) -> int:
        """Return the number of images before the video in the text."""
        return "\n".join(turn.question for turn in self.turns).partition(VIDEO)[0].count(PLACE)

    def with_frames_as_images(self, frames: int) -> TrainingRecord:
        """Return the record with places of images, one for each frame, instead of that of the video."""
        turns = [replace(turn, question=turn.question.replace(VIDEO, PLACE * frames)) for turn in self.turns]
        return replace(self, turns=tuple(turns), video=None)


@contextmanager
def _bad_videos() -> Iterator[None]:
    """Raise `BadRecord` for a video that cannot be read."""
    try:
        yield
    except UserError as error:
        raise BadRecord(f"a video {getattr(error, 'kind', 'cannot be read')}") from error


def _load_images(folder: Path, paths: Sequence[str]) -> list[Image.Image]:
    try:
        return [load_image(folder / path) for path in paths]
    except ImageError as error:
        raise BadRecord(f"an image {error.kind}") from error


def _frames_in(folder: Path, video: str) -> list[str]:
    """Return the paths of the files in the folder of a video, by name. Numbers in names are compared as numbers."""
    try:
        names = [path.name for path in (folder / video).iterdir() if path.is_file() and path.name[0] != "."]
    except OSError:
        raise BadRecord("a folder of frames is missing") from None
    if not names:
        raise BadRecord("a folder of frames is empty")
    names.sort(key=lambda name: re.sub(r"\d+", lambda digits: digits[0].zfill(LONGEST_NUMBER), name))
    return [f"{video}/{name}" for name in names]


def read_record(content: object) -> TrainingRecord:
    """Return the record in parsed JSON. Raise `BadRecord` if it is not in LLaVA's format."""
    if not isinstance(content, dict):
        raise BadRecord("not an object")
    parts = content.get("conversations")
    if not isinstance(parts, list) or not parts:
        raise BadRecord("no conversations")
    turns = tuple(_turns(parts))
    images, video = _images(content), _video(content)
    if sum(turn.question.count(PLACE) for turn in turns) != len(images):
        raise BadRecord(f"not as many {PLACE} as images")
    if sum(turn.question.count(VIDEO) for turn in turns) != bool(video):
        raise BadRecord(f"not as many {VIDEO} as videos")
    return TrainingRecord(str(content.get("id", "")), turns, tuple(images), video)


def _images(content: dict[str, object]) -> list[str]:
    """Return the paths of a record's images."""
    values = [content[name] for name in ("image", "images") if content.get(name) is not None]
    if len(values) > 1:
        raise BadRecord("both image and images")
    value = values[0] if values else []
    paths = [value] if isinstance(value, str) else value
    if not _are_paths(paths):
        raise BadRecord("image is not a path or a list of paths")
    return list(paths)


def _video(content: dict[str, object]) -> str | tuple[str, ...] | None:
    """Return a record's video; see `TrainingRecord.video`."""
    if content.get("videos") is not None:
        raise BadRecord("videos: only one video can be given, as video")
    value = content.get("video")
    paths: object = [value] if isinstance(value, str) else value or []
    if not _are_paths(paths):
        raise BadRecord("video is not a path or a list of image paths")
    if not isinstance(value, str) and any(map(is_video, paths)):
        raise BadRecord("a video file in a list; give it as the video, or give its frames as a list of images")
    return value if isinstance(value, str) else tuple(paths) or None


def _are_paths(paths: object) -> TypeGuard[list[str]]:
    return isinstance(paths, list) and all(isinstance(path, str) and path for path in paths)


def _turns(parts: Sequence[object]) -> Iterator[Turn]:
    """Yield the turns of a conversation, whose parts are questions and answers in alternation."""
    for part in parts:
        if isinstance(part, Mapping) and part.get("from") == "system":
            raise BadRecord("a system turn; only human and gpt may take turns")
    if len(parts) % 2:
        raise BadRecord("a conversation that does not end with an answer")
    for human, model in zip(parts[::2], parts[1::2], strict=True):
        question, answer = _text(human, HUMAN), _text(model, MODEL)
        for place in (PLACE, VIDEO):
            if place in answer:
                raise BadRecord(f"an answer with {place}")
        if not answer.strip():
            raise BadRecord("an empty answer")
        yield Turn(question, answer)


def _text(part: object, speakers: tuple[str, ...]) -> str:
    """Return the text of a part of a conversation, which must be by one of `speakers`."""
    if not isinstance(part, dict) or not isinstance(part.get("value"), str):
        raise BadRecord("a part of the conversation without text")
    if part.get("from") not in speakers:
        raise BadRecord("human and gpt do not take turns")
    try:
        part["value"].encode()
    except UnicodeEncodeError:
        raise BadRecord("half a character in the text (a lone surrogate)") from None
    return part["value"]


class Records:
    """The good records of a file, as a sequence that reads each record from the disk on access.

    `numbers` lists, for each good record, its 0-based number among all records of the file. `bad` lists the number of
    each bad record and the reason.
    """

    def __init__(self, path: Path) -> None:
        """Index the file.

        Raise `UserError` if it cannot be read, ends in the middle of a record, or has no good record.
        """
        self.path = path
        self.bad: list[tuple[int, str]] = []
        self.numbers = array("Q")
        self._begins, self._ends, self._images = array("Q"), array("Q"), array("Q")
        self._videos = array("B")
        try:
            for number, (begin, text) in enumerate(_texts(path)):
                try:
                    record = read_record(_parsed(text))
                except BadRecord as reason:
                    self.bad.append((number, str(reason)))
                    continue
                is_file = isinstance(record.video, str) and is_video(record.video)
                kind = VIDEO_FILE if is_file else FRAMES if record.video is not None else 0
                columns = (number, begin, begin + len(text), record.listed, kind)
                for values, value in zip(self._columns(), columns, strict=True):
                    values.append(value)
        except OSError as error:
            raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
        if not self._begins:
            raise UserError(f"{str(path)!r} has no record to train on{self._first_bad()}")

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, number: int) -> TrainingRecord:
        with self.path.open("rb") as file:
            file.seek(self._begins[number])
            return read_record(_parsed(file.read(self.size(number))))

    def images(self, number: int) -> int:
        """Return the number of images of a record, and of frames of its video."""
        return self._images[number]

    @property
    def have_videos(self) -> bool:
        """Return whether any record has a video."""
        return any(self._videos)

    @property
    def have_video_files(self) -> bool:
        """Return whether the video of any record is a video file."""
        return VIDEO_FILE in self._videos

    def size(self, number: int) -> int:
        """Return the bytes of a record in the file, a rough measure of its length."""
        return self._ends[number] - self._begins[number]

    def _columns(self) -> tuple[array[int], ...]:
        return self.numbers, self._begins, self._ends, self._images, self._videos

    def _first_bad(self) -> str:
        if not self.bad:
            return ": it is empty"
        return f"; {len(self.bad):,} are bad, the first (record {self.bad[0][0]}): {self.bad[0][1]}"


def _parsed(text: bytes) -> object:
    try:
        return parse(text)
    except JsonError as error:
        raise BadRecord(error.kind) from None


def _texts(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield each record's offset in the file and its bytes, which are empty for invalid JSON in a list."""
    with open_json(path) as file:
        if not file.seekable():
            raise OSError("it is a pipe, which can be read only once; give a file")
        first = file.read(CHUNK).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    return _elements(path) if first == b"[" else _lines(path)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    for line in read_lines(path):
        yield line.begin, line.text


def _elements(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and bytes of each value of one JSON list.

    A value is bad, and its bytes are empty, if it does not parse or no comma follows. It ends where the next object
    begins that parses and has "conversations". Raise `UserError` if the file ends in the middle of a value.
    """
    with path.open("rb") as file:
        window = _Window(file)
        begin = window.skip(window.skip(0) + 1)
        while not window.closes(begin):
            window.keep, window.ran_out = begin, False
            value, stop = window.value(begin)
            after = window.skip(stop)
            if value is not BROKEN and (window.character(after) == "," or window.closes(after)):
                yield begin, window.cut(begin, stop)
                begin = window.skip(after + 1) if window.character(after) == "," else after
                continue
            lost, following = _next_record(window, begin + 1)
            if following is None and (window.ran_out or not _ends_closed(path)):
                raise UserError(
                    f"{str(path)!r} ends in the middle of a record, which begins at byte {begin}: was it cut short?"
                    " Get the complete file, or fix that record"
                )
            yield from [(begin, b"")] * max(1, lost)
            if following is None:
                return
            begin = following


def _next_record(window: _Window, at: int) -> tuple[int, int | None]:
    """Return the number of lost records from `at` to the next record that parses, and its offset, or `None`.

    A key "conversations" outside of an object that parses counts as a lost record.
    """
    lost = 0
    while (place := window.search(at)) is not None:
        if window.character(place) == "{":
            window.keep = place
            value, _ = window.value(place)
            if isinstance(value, dict) and "conversations" in value:
                return lost, place
        else:
            lost += 1
        at = place + 1
    return lost, None


def _ends_closed(path: Path) -> bool:
    """Return whether the file ends with the bracket that closes the list."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST))
        return file.read().rstrip().endswith(b"]")


#: Stands for a value that does not parse.
BROKEN = object()
_DECODER = json.JSONDecoder()
#: Blanks, and the byte order mark that some editors put before UTF-8.
_BLANK = re.compile("[ \t\r\n\xef\xbb\xbf]*")
_CONVERSATIONS = '"conversations"'
_OPENS_RECORD = re.compile("{|" + _CONVERSATIONS)
#: More text may change how the last characters parse, but none further from the end than this: `-Infinity` or
#: `\\uD83D\\uDE00` may be cut.
_UNSURE = 16


class _Window:
    """The part of a file that is in memory. All offsets are bytes from the beginning of the file.

    The bytes are decoded as Latin-1, one character per byte: JSON's own characters are the same in it and in UTF-8.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._text, self._start = file, "", 0
        self.keep = 0
        """The first offset that must stay in memory."""
        self.ran_out = False
        """Whether the file ended before a value did."""

    def character(self, at: int) -> str:
        """Return the character at `at`; empty at the end of the file."""
        return self._text[at - self._start : at - self._start + 1]

    def cut(self, begin: int, end: int) -> bytes:
        return self._text[begin - self._start : end - self._start].encode("latin-1")

    def skip(self, at: int) -> int:
        """Return the offset of the first non-blank character from `at` on, or of the end of the file."""
        while True:
            blanks = _BLANK.match(self._text, at - self._start)
            at = max(at, self._start + blanks.end()) if blanks else at
            if at < self._end() or not self._read():
                return at

    def closes(self, at: int) -> bool:
        """Return whether the list, and with it the file, ends at `at`."""
        return self.character(at) == "]" and self.character(self.skip(at + 1)) == ""

    def search(self, at: int) -> int | None:
        """Return the next offset from `at` on of an opening brace or a key "conversations", or `None`."""
        while True:
            if match := _OPENS_RECORD.search(self._text, at - self._start):
                return self._start + match.start()
            self.keep = at = max(at, self._end() - len(_CONVERSATIONS) + 1)  # the key may be cut in two
            if not self._read():
                return None

    def value(self, at: int) -> tuple[object, int]:
        """Return the JSON value at `at` and the offset of its end, or `BROKEN` and the offset of the error."""
        while True:
            value, stop = _decoded(self._text, at - self._start)
            if stop < len(self._text) - _UNSURE or not self._read():
                break
        stop += self._start
        self.ran_out |= value is BROKEN and self.character(self.skip(stop)) == ""
        return value, stop

    def _end(self) -> int:
        return self._start + len(self._text)

    def _read(self) -> bool:
        """Read on, and return whether there was more.

        It reads as much as it keeps, so the total work of parsing from `keep` again stays linear in the file's size.
        """
        kept = self._text[self.keep - self._start :]
        more = self._file.read(max(CHUNK, len(kept))) if len(kept) < LONGEST else b""
        if more:
            self._text, self._start = kept + more.decode("latin-1"), self.keep
        return bool(more)


def _decoded(text: str, at: int) -> tuple[object, int]:
    """Return the JSON value at index `at` and the index of its end, or `BROKEN` and the index of the error."""
    try:
        return _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        unclosed = error.msg.startswith("Unterminated string")
        return BROKEN, len(text) if unclosed else error.pos
    except (ValueError, RecursionError):  # a number of thousands of digits; brackets nested too deeply
        return BROKEN, at
