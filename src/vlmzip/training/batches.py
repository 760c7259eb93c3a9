"""Turn records into tensors: chat-template prompts, labels on the answers only, and padded batches."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from os import SEEK_END
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.json_text import JsonError, parse, read_lines, write_line
from vlmzip.methods import NoCompression
from vlmzip.models.family import Family
from vlmzip.processor import Processor
from vlmzip.runtime.compress import least_counts
from vlmzip.runtime.inputs import positions_of
from vlmzip.runtime.position_limit import llm_positions
from vlmzip.runtime.prompt import PER_TOKEN
from vlmzip.runtime.prompt_text import special_tokens
from vlmzip.runtime.videos import Clip, check_memory, evenly_spaced, expected_frames
from vlmzip.training.records import PLACE, RATE, VIDEO, BadRecord, Records, TrainingRecord, Turn

#: The label that the loss ignores.
IGNORE = -100
#: Width and height, in pixels, of the blank image for a batch without images.
BLANK = (336, 336)
#: A number of frames that no processor expects.
MANY_FRAMES = 10**9
#: The file that lists each record that was left out, with the reason.
BAD = "bad_records.jsonl"


class Preprocessor:
    """A function from a record to the inputs of a model and labels.

    The processor's chat template writes the conversation. The labels are the answers, each with an end-of-text token,
    which is added if the template has none: a model that never saw the token would not know when to stop.
    """

    def __init__(
        self,
        processor: Processor,
        family: Family,
        max_length: int,
        frames: int | None = None,
        compressors: Sequence[Compressor] = (NoCompression(),),
    ) -> None:
        """Try the processor out. `max_length` counts the tokens that the LLM gets.

        A record must fit with each of `compressors`, those of the stages, if its images keep as few tokens as they can.
        `frames` is the number of frames of each video; see `_choose_frames`. Raise `UserError` for a processor
        whose conversations cannot be labelled, or that has no chat template, fast tokenizer or end-of-text token.
        """
        self.processor, self.tokenizer, self.max_length = processor, processor.tokenizer, max_length
        self.family, self.frames, self.compressors = family, frames, compressors
        self.positions = llm_positions(family)
        self._video_processor = getattr(processor, "video_processor", None)
        self.takes_videos = len(family.modalities) > 1 and self._video_processor is not None
        if frames and self._stacks_videos:  # short videos repeat frames
            check_memory("a video", frames, BLANK)
        self.placeholders = [each.placeholder_id for each in family.modalities]
        if not getattr(processor, "chat_template", None):
            raise UserError(
                "the checkpoint's processor has no chat template: save one with it (processor.chat_template)"
            )
        if not self.tokenizer.is_fast:
            raise UserError("the checkpoint has no fast tokenizer, which is needed to tell answers from questions")
        if self.tokenizer.eos_token is None:
            raise UserError("the checkpoint's tokenizer has no end-of-text token for the ends of answers")
        self._reserved = _reserved_words(processor, self.tokenizer.convert_ids_to_tokens(self.placeholders))
        self._end = self._try_out()

    def __call__(self, record: TrainingRecord, folder: Path) -> dict[str, Tensor]:
        """Return the inputs of one row and `labels` [tokens]. Only the inputs of images have a batch axis: the images.

        Raise `BadRecord` if an image cannot be read, the processor refuses the record, or it is longer than
        `max_length` or the LLM's positions.
        """
        self._refuse_reserved_words(record)
        images, clip = record.load_images(folder), None
        if record.video is not None:
            clip = record.load_video(folder, partial(self._choose_frames, listed=isinstance(record.video, tuple)))
            if not self.takes_videos:
                images[record.images_before_video : record.images_before_video] = clip.frames
                record, clip = record.with_frames_as_images(len(clip.frames)), None
            elif len({frame.size for frame in clip.frames}) > 1:
                raise BadRecord("a video with frames of different sizes")
        text, answers = self._rendered(record, self._end)
        try:
            row = self._row(text, images, clip)
        except (TypeError, ValueError) as error:  # the record's fault, not the processor's, which was tried out
            raise BadRecord(f"the processor refuses it: {_beginning(str(error))}") from error
        self._refuse_long(row)
        return {**row, "labels": self._labels(row["input_ids"], text, answers, has_video=clip is not None)}

    def _choose_frames(self, total: int, fps: float | None, *, listed: bool) -> list[int]:
        """Return the numbers of the frames to take from a video of `total` frames: as many as `ask` takes, or `frames`.

        All frames of a list are taken if `frames` is not given. If all videos of a batch are one tensor, each needs
        equally many frames, so short videos repeat frames.
        """
        if not self._stacks_videos:
            count = self.frames or (total if listed else expected_frames(self._video_processor, total, fps))
            return evenly_spaced(total, count)
        count = self.frames or expected_frames(self._video_processor, MANY_FRAMES, None)
        return evenly_spaced(total, count) if total >= count else [number * total // count for number in range(count)]

    @property
    def _stacks_videos(self) -> bool:
        """Return whether all videos of a batch are one tensor."""
        return self.takes_videos and self.family.stacks_videos

    @property
    def longest(self) -> int:
        """Return the most tokens of a row that the LLM gets."""
        return min(self.max_length, self.positions or self.max_length)

    def blank(self) -> dict[str, Tensor]:
        """Return a row with a black image and no labels, so that nothing is learned from it."""
        return self._unlearned(PLACE, [Image.new("RGB", BLANK)])

    def blank_video(self) -> dict[str, Tensor]:
        """Return a row with a black video and no labels."""
        numbers = self._choose_frames(2, None, listed=True)
        return self._unlearned(VIDEO, [], Clip("", [Image.new("RGB", BLANK)] * len(numbers), numbers, 2, RATE))

    def _unlearned(self, place: str, images: Sequence[Image.Image], clip: Clip | None = None) -> dict[str, Tensor]:
        text, _ = self._rendered(TrainingRecord("", (Turn(f"{place}\n?", "!"),), ()), self._end)
        row = self._row(text, images, clip)
        return {**row, "labels": torch.full_like(row["input_ids"], IGNORE)}

    def _try_out(self) -> str:
        """Return the text to write after each answer: the end-of-text token, or nothing if the template writes it.

        Raise `UserError` for a processor whose conversations cannot be labelled.
        """
        eos = self.tokenizer.eos_token
        try:
            text, (answer,) = self._rendered(TrainingRecord("", (Turn("?", "!"),), ()), end="")
            end = "" if eos in text[slice(*answer)] else eos
            text, answers = self._rendered(TrainingRecord("", (Turn(f"{PLACE}\n?", "!"), Turn("?", "yes")), ()), end)
            self._labels(self._row(text, [Image.new("RGB", BLANK)])["input_ids"], text, answers)
            self._refuse_merged(text, answers)
        except BadRecord as reason:
            raise UserError(f"the checkpoint's processor cannot be used for training: {reason}") from None
        return end

    def _refuse_reserved_words(self, record: TrainingRecord) -> None:
        for turn in record.turns:
            for word in self._reserved:
                if word in turn.question or word in turn.answer:
                    raise BadRecord(f"{word} in the text, which stands for an image or video here")
            if self.tokenizer.eos_token in turn.answer:
                raise BadRecord(f"an answer with the end of text in it, {self.tokenizer.eos_token}")

    def _refuse_long(self, row: Mapping[str, Tensor]) -> None:
        """Raise `BadRecord` for a row that does not fit, even if its images keep the fewest tokens that they can."""
        length = len(row["input_ids"])
        if length <= min(self.max_length, self.positions or length):
            return
        inputs = {**row, "input_ids": row["input_ids"][None]}
        present = self.family.present_in(inputs)
        layouts = [layout for each in present for layout in each.layouts(inputs)]
        visual = sum(layout.placeholders for layout in layouts)
        for compressor in self.compressors:
            kept = length - visual + sum(least_counts(layouts, compressor))
            if kept > self.max_length:
                raise BadRecord(f"longer than {self.max_length} tokens")
            taken = length if positions_of(compressor, self.family) == "original" else kept
            if self.positions is not None and taken > self.positions:
                raise BadRecord(f"longer than the LLM's {self.positions} positions")

    def _row(self, text: str, images: Sequence[Image.Image], clip: Clip | None = None) -> dict[str, Tensor]:
        settings: dict[str, object] = dict(special_tokens(self.tokenizer, text))
        if clip is not None:
            settings |= {"videos": [clip.as_array()], "video_metadata": [clip.metadata], "do_sample_frames": False}
        outputs = self.processor(images=list(images) or None, text=[text], return_tensors="pt", **settings)
        inputs = self.family.with_names_of_model(outputs)
        return {name: value[0] if name in ("input_ids", *PER_TOKEN) else value for name, value in inputs.items()}

    def _rendered(self, record: TrainingRecord, end: str) -> tuple[str, list[tuple[int, int]]]:
        """Return the conversation as text, and the span of each answer in it, including the answer's end of text.

        Raise `BadRecord` if the template refuses the conversation, or changes earlier turns when another turn is added.
        """
        messages: list[dict[str, object]] = []
        for turn in record.turns:
            messages.append({"role": "user", "content": _parts(turn.question)})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer.strip() + end}]})

        def render(beginning: list[dict[str, object]], **settings: bool) -> str:
            try:
                return self.processor.apply_chat_template(beginning, **settings)
            except Exception as error:  # templates are code, and may raise anything
                raise BadRecord(f"the chat template refuses it: {_beginning(str(error))}") from error

        whole, answers = render(messages), []
        for count in range(1, len(messages), 2):
            before = render(messages[:count], add_generation_prompt=True)
            after = render(messages[: count + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise BadRecord("the chat template rewrites earlier turns, so answers cannot be labelled")
            begin, stop = len(before), len(after)
            eos = after.find(self.tokenizer.eos_token, begin)
            answers.append((begin, stop if eos < 0 else eos + len(self.tokenizer.eos_token)))
        return whole, answers

    def _labels(self, ids: Tensor, text: str, answers: Sequence[tuple[int, int]], *, has_video: bool = False) -> Tensor:
        """Return the ids of tokens that contain a part of an answer, `IGNORE` elsewhere.

        The processor replaces each placeholder in the text by many. All other tokens must be those of the text, in
        order; `BadRecord` is raised if they are not. With a video, there may be more tokens at one place: markers and
        times of its frames.
        """
        plain, spans = self._tokens(text)
        # Indices into the tokens of the text, and into `ids`; both skip the placeholders.
        words = [n for n, token in enumerate(plain) if token not in self.placeholders]
        places = [n for n, token in enumerate(ids.tolist()) if token not in self.placeholders]
        if has_video and len(places) > len(words):
            before = _equal_first([plain[n] for n in words], ids[places].tolist())
            places = places[:before] + places[len(places) - len(words) + before :]
        if [plain[n] for n in words] != ids[places].tolist():
            raise BadRecord(f"{type(self.processor).__name__} rewrites it: answers cannot be told from questions")
        labels = torch.full_like(ids, IGNORE)
        for place, n in zip(places, words, strict=True):
            if any(_overlap(spans[n], answer) for answer in answers):
                labels[place] = ids[place]
        if bool((labels == IGNORE).all()):
            raise BadRecord("no token of the answers is left")
        return labels

    def _tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token ids of the text, and the span of characters of each token."""
        plain = self.tokenizer(text, return_offsets_mapping=True, **special_tokens(self.tokenizer, text))
        return plain["input_ids"], plain["offset_mapping"]

    def _refuse_merged(self, text: str, answers: Sequence[tuple[int, int]]) -> None:
        """Raise `BadRecord` if one token contains both the last word of a prompt and the first word of an answer.

        White space between them may belong to the token of either.
        """
        for begin, stop in self._tokens(text)[1]:
            for first, _ in answers:
                if begin < first < stop and text[begin:first].strip() and text[first:stop].strip():
                    merged = text[begin:stop]
                    raise BadRecord(f"its chat template joins the answer to the prompt: {merged!r} is one token")


def _equal_first(these: Sequence[int], those: Sequence[int]) -> int:
    """Return how many values at the beginning of two sequences are equal."""
    return next((n for n, (one, other) in enumerate(zip(these, those, strict=False)) if one != other), len(these))


def _overlap(token: tuple[int, int], answer: tuple[int, int]) -> bool:
    """Return whether a token's span and an answer's span overlap.

    The span of a token of white space can be empty, at the token's end (the tokenizer's `trim_offsets`).
    """
    return token[0] < answer[1] and token[1] > answer[0]


def _parts(question: str) -> list[dict[str, str]]:
    """Return a question as a chat template takes it: its images, video and texts, in order."""
    parts: list[dict[str, str]] = []
    for part in re.split(f"({PLACE}|{VIDEO})", question):
        if part in (PLACE, VIDEO):
            parts.append({"type": "image" if part == PLACE else "video"})
        elif text := part.strip("\n" if part.strip() else None):
            parts.append({"type": "text", "text": text})
    return parts


def _reserved_words(processor: Processor, placeholders: Sequence[str]) -> list[str]:
    """Return the words that a processor takes for an image or video wherever they occur in a text.

    `PLACE` and `VIDEO` are left out: `records` counts them as an image and a video.
    """
    words = [*placeholders, *(getattr(processor, name, None) for name in ("image_token", "video_token"))]
    return [word for word in dict.fromkeys(words) if word and word not in (PLACE, VIDEO)]


def _beginning(message: str) -> str:
    """Return the beginning of an error message, without details of one record, so that records share a reason."""
    return re.split(r"[,.;:]?\s*\n|[,.;:]\s", message)[0][:120]


class Examples(Dataset[dict[str, Tensor]]):
    """A dataset of rows for training. The next good record replaces one that turns out to be bad.

    Each process notes each bad record that it met once, in a file that all share. `count_bad` counts them.
    """

    def __init__(
        self,
        records: Records,
        folder: Path,
        conversations: Preprocessor,
        notes: Path,
        chosen: Sequence[int] | None = None,
    ) -> None:
        """Use the `chosen` indices of `records`, by default all; `notes` is the file that lists bad records."""
        self.records, self.folder, self.conversations, self.notes = records, folder, conversations, notes
        self.chosen = range(len(records)) if chosen is None else chosen
        self._noted: set[int] = set()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        for step in range(len(self)):
            index = self.chosen[(number + step) % len(self)]
            try:
                return self.conversations(self.records[index], self.folder)
            except BadRecord as reason:
                self._note(index, str(reason))
        raise UserError(f"no record of {str(self.records.path)!r} can be trained on; see {str(self.notes)!r}")

    def look_at(self, count: int) -> tuple[int, Counter[str], str]:
        """Try up to `count` records, evenly spaced over the file, and note the bad ones.

        Return how many records were tried, the number of bad ones by reason, and the first error in full.
        """
        first = ""
        places = sorted({number * len(self) // count for number in range(count)})
        reasons: Counter[str] = Counter()
        for index in (self.chosen[place] for place in places):
            try:
                self.conversations(self.records[index], self.folder)
            except BadRecord as reason:
                self._note(index, str(reason))
                reasons[str(reason)] += 1
                first = first or str(reason.__cause__ or reason)
        return len(places), reasons, first

    def lengths(self, visual_tokens: int) -> list[int]:
        """Estimate the tokens of each record, at four bytes of text per token, for grouping rows by length."""
        return [self.records.size(n) // 4 + visual_tokens * self.records.images(n) for n in self.chosen]

    def _note(self, number: int, reason: str) -> None:
        if number not in self._noted:
            self._noted.add(number)
            note_bad(self.notes, [(self.records.numbers[number], reason)])


def note_bad(notes: Path, bad: Sequence[tuple[int, str]]) -> None:
    """Append bad records, each by its number in the file and a reason, to the notes."""
    lines = "".join(write_line({"record": number, "reason": reason}) for number, reason in bad)
    lines = "\n" + lines if _ends_cut(notes) else lines
    with notes.open("ab", buffering=len(lines) + 2) as file:  # one write: other processes append lines, too
        file.write(lines.encode())


def _ends_cut(notes: Path) -> bool:
    """Return whether the last line is incomplete, after a kill or on a full disk."""
    if not notes.exists() or not notes.stat().st_size:
        return False
    with notes.open("rb") as file:
        file.seek(-1, SEEK_END)
        return file.read() != b"\n"


def count_bad(notes: Path) -> Counter[str]:
    """Count the records that were left out so far, by reason."""
    if not notes.exists():
        return Counter()
    reasons: dict[int, str] = {}  # by the record's number: several processes may have noted the same record
    for line in read_lines(notes):
        if not line.text.rstrip().endswith(b"}"):
            continue  # an incomplete line
        try:
            note = parse(line.text)
            reasons[note["record"]] = note["reason"]
        except (JsonError, KeyError, TypeError) as error:
            raise UserError(
                f"{notes}:{line.number} cannot be read as a note about a skipped record: {error}; delete the line"
            ) from None
    return Counter(reasons.values())


class Collator:
    """A collator that pads rows on the right to the longest one and concatenates their images.

    A batch without images gets the row `blank` in addition, as in LLaVA's code, so that encoder and projector run in
    every forward. With several processes they must: the others would wait forever for a process that skips them. If
    some records have videos, `blanks` has a row with a video, too: videos go through the encoder in a run of their own.
    """

    def __init__(self, pad_id: int, *blanks: Mapping[str, Tensor]) -> None:
        self._blanks = blanks
        self._fill = {"input_ids": pad_id, "labels": IGNORE}

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        rows = [*rows, *(blank for blank in self._blanks if not any(blank.keys() <= row.keys() for row in rows))]
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row[name] for row in rows if name in row]  # rows without images lack the inputs of images
            if name in ("input_ids", *PER_TOKEN):
                batch[name] = torch.stack([self._padded(name, value, longest) for value in values])
            else:
                batch[name] = _joined(values)
        return batch

    def _padded(self, name: str, value: Tensor, length: int) -> Tensor:
        return torch.nn.functional.pad(value, (0, length - len(value)), value=self._fill.get(name, 0))


def _joined(values: Sequence[Tensor]) -> Tensor:
    """Return the images of several rows as one tensor, with zeros where an image has fewer tiles or pixels.

    Processors fill up the images of a batch in the same way, and models leave the filling out.
    """
    sizes = torch.tensor([value.shape[1:] for value in values]).amax(0).tolist()
    edges = [
        [edge for have, need in zip(v.shape[1:], sizes, strict=True) for edge in (need - have, 0)][::-1] for v in values
    ]
    return torch.cat([torch.nn.functional.pad(v, edge) for v, edge in zip(values, edges, strict=True)])
