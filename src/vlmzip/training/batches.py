"""From records to tensors: prompts by the processor's chat template, labels on answers alone, rows padded together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from os import SEEK_END
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vlmzip.errors import UserError
from vlmzip.json_text import JsonError, parse, read_lines, write_line
from vlmzip.models.adapter import ModelAdapter
from vlmzip.runtime.positions import llm_positions
from vlmzip.runtime.prompt import PER_TOKEN
from vlmzip.runtime.prompts import special_tokens
from vlmzip.training.records import PLACE, BadRecord, Records, TrainingRecord, Turn

#: What the loss leaves out.
IGNORE = -100
#: Width and height of the image of a batch that has none, in pixels.
BLANK = (336, 336)
#: One line for each record that was left out, with the reason.
BAD = "bad_records.jsonl"


class Preprocessor:
    """Turns a record into the inputs of a model, and labels.

    What is said is put into words by the processor's chat template. Labels are the answers and, behind each, the end of
    the text, which is added where the template has none: a model that never saw it would not know when to stop.
    """

    def __init__(self, processor: Any, adapter: ModelAdapter, max_length: int) -> None:
        """`max_length`: tokens, visual ones uncompressed. Raises `UserError` for a processor without chat template."""
        self.processor, self.tokenizer, self.max_length = processor, processor.tokenizer, max_length
        self.positions = llm_positions(adapter)
        self.placeholder = adapter.placeholder_id
        if not getattr(processor, "chat_template", None):
            raise UserError(
                "the checkpoint's processor has no chat template: save one with it (processor.chat_template)"
            )
        if not self.tokenizer.is_fast:
            raise UserError("the checkpoint has no fast tokenizer, which is needed to tell answers from questions")
        if self.tokenizer.eos_token is None:
            raise UserError("the checkpoint's tokenizer has no end-of-text token for the ends of answers")
        self._own = _own_words(processor, self.tokenizer.convert_ids_to_tokens(self.placeholder))
        self._end = self._try_out()

    def __call__(self, record: TrainingRecord, folder: Path) -> dict[str, Tensor]:
        """Inputs of one row, without a batch axis but for the images' own, and `labels` [tokens].

        Raises `BadRecord` for what cannot be read, what the processor refuses, and what is longer than `max_length` or
        than the LLM has positions.
        """
        self._refuse_own_words(record)
        images = record.load_images(folder)
        text, answers = self._rendered(record, self._end)
        try:
            row = self._row(text, images)
        except (TypeError, ValueError) as error:  # not of its own: it was tried out
            raise BadRecord(f"the processor refuses it: {_beginning(str(error))}") from error
        self._refuse_long(len(row["input_ids"]))
        return {**row, "labels": self._labels(row["input_ids"], text, answers)}

    def blank(self) -> dict[str, Tensor]:
        """A row about a black image that nothing is learned from: no token of it is a label."""
        text, _ = self._rendered(TrainingRecord("", (Turn(f"{PLACE}\n?", "!"),), ()), self._end)
        row = self._row(text, [Image.new("RGB", BLANK)])
        return {**row, "labels": torch.full_like(row["input_ids"], IGNORE)}

    def _try_out(self) -> str:
        """What to write behind an answer. Raises `UserError` for a processor whose conversations cannot be labelled."""
        eos = self.tokenizer.eos_token
        try:
            text, (answer,) = self._rendered(TrainingRecord("", (Turn("?", "!"),), ()), end="")
            end = "" if eos in text[slice(*answer)] else eos
            text, answers = self._rendered(TrainingRecord("", (Turn(f"{PLACE}\n?", "!"), Turn("?", "yes")), ()), end)
            self._labels(self._row(text, [Image.new("RGB", BLANK)])["input_ids"], text, answers)
            self._refuse_merged(text, answers)
        except BadRecord as reason:
            raise UserError(f"no conversation of the checkpoint's processor can be trained on: {reason}") from None
        return end

    def _refuse_own_words(self, record: TrainingRecord) -> None:
        for turn in record.turns:
            for word in self._own:
                if word in turn.question or word in turn.answer:
                    raise BadRecord(f"{word} in the text, which stands for an image or video here")
            if self.tokenizer.eos_token in turn.answer:
                raise BadRecord(f"an answer with the end of text in it, {self.tokenizer.eos_token}")

    def _refuse_long(self, length: int) -> None:
        if length > self.max_length:
            raise BadRecord(f"longer than {self.max_length} tokens")
        if self.positions is not None and length > self.positions:
            raise BadRecord(f"longer than the LLM's {self.positions} positions")

    def _row(self, text: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        special = special_tokens(self.tokenizer, text)
        made = self.processor(images=list(images) or None, text=[text], return_tensors="pt", **special)
        return {name: value[0] if name in ("input_ids", *PER_TOKEN) else value for name, value in made.items()}

    def _rendered(self, record: TrainingRecord, end: str) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as the model reads it, and where in it the answers are, their ends included.

        Raises `BadRecord` where the template refuses it, or takes back what it said.
        """
        messages: list[dict[str, Any]] = []
        for turn in record.turns:
            messages.append({"role": "user", "content": _parts(turn.question)})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer.strip() + end}]})

        def render(some: list[dict[str, Any]], **settings: bool) -> str:
            try:
                return self.processor.apply_chat_template(some, **settings)
            except Exception as error:  # templates are code, and raise what they like
                raise BadRecord(f"the chat template refuses it: {_beginning(str(error))}") from error

        whole, answers = render(messages), []
        for count in range(1, len(messages), 2):
            before = render(messages[:count], add_generation_prompt=True)
            after = render(messages[: count + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise BadRecord("the chat template says it in another way once it goes on: it cannot be labelled")
            begin, stop = len(before), len(after)
            said = after.find(self.tokenizer.eos_token, begin)
            answers.append((begin, stop if said < 0 else said + len(self.tokenizer.eos_token)))
        return whole, answers

    def _labels(self, ids: Tensor, text: str, answers: Sequence[tuple[int, int]]) -> Tensor:
        """Return the ids of the tokens that hold any of the answers, `IGNORE` elsewhere.

        The processor writes many placeholders where the text has one; all other tokens are the text's own, in order.
        Raises `BadRecord` where they are not.
        """
        plain, spans = self._tokens(text)
        own = [n for n, token in enumerate(plain) if token != self.placeholder]
        places = (ids != self.placeholder).nonzero()[:, 0].tolist()
        if [plain[n] for n in own] != ids[places].tolist():
            raise BadRecord(f"{type(self.processor).__name__} rewrites it: answers cannot be told from questions")
        labels = torch.full_like(ids, IGNORE)
        for place, n in zip(places, own, strict=True):
            if any(_overlap(spans[n], answer) for answer in answers):
                labels[place] = ids[place]
        if bool((labels == IGNORE).all()):
            raise BadRecord("no token of the answers is left")
        return labels

    def _tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the text's tokens, and from where to where in it each of them stands."""
        plain = self.tokenizer(text, return_offsets_mapping=True, **special_tokens(self.tokenizer, text))
        return plain["input_ids"], plain["offset_mapping"]

    def _refuse_merged(self, text: str, answers: Sequence[tuple[int, int]]) -> None:
        """Raise `BadRecord` where a token holds the last word of the prompt and the first one of an answer.

        White space between them may stand in either's token.
        """
        for begin, stop in self._tokens(text)[1]:
            for first, _ in answers:
                if begin < first < stop and text[begin:first].strip() and text[first:stop].strip():
                    merged = text[begin:stop]
                    raise BadRecord(f"its chat template joins the answer to the prompt, {merged!r} is one token")


def _overlap(token: tuple[int, int], answer: tuple[int, int]) -> bool:
    """Whether a token holds any of an answer.

    The span of a token that is white space alone can be empty (`trim_offsets`): it stands where the token ends.
    """
    return token[0] < answer[1] and token[1] > answer[0]


def _parts(question: str) -> list[dict[str, str]]:
    """A question as chat templates take it: its images and the text around them, in order."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(question.split(PLACE)):
        if number:
            parts.append({"type": "image"})
        if text := text.strip("\n" if text.strip() else None):
            parts.append({"type": "text", "text": text})
    return parts


def _own_words(processor: Any, placeholder: str) -> list[str]:
    """What a processor takes for an image or video wherever it is written; `PLACE` is counted as one elsewhere."""
    words = [placeholder, *(getattr(processor, name, None) for name in ("image_token", "video_token"))]
    return [word for word in dict.fromkeys(words) if word and word != PLACE]


def _beginning(message: str) -> str:
    """Up to where an error begins to speak of the one record; so records of a kind have the same reason."""
    return re.split(r"[,.;:]?\s*\n|[,.;:]\s", message)[0][:120]


class Examples(Dataset):
    """Rows for training. In place of a record that turns out to be bad stands the next good one.

    Bad records are noted in a file, each once for each process that met it; `count_bad` sums up.
    """

    def __init__(
        self,
        records: Records,
        folder: Path,
        conversations: Preprocessor,
        notes: Path,
        chosen: Sequence[int] | None = None,
    ) -> None:
        """`chosen`: which of the records are used; default: all."""
        self.records, self.folder, self.conversations, self.notes = records, folder, conversations, notes
        self.chosen = range(len(records)) if chosen is None else chosen
        self._noted: set[int] = set()

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        for step in range(len(self)):
            here = self.chosen[(number + step) % len(self)]
            try:
                return self.conversations(self.records[here], self.folder)
            except BadRecord as reason:
                self._note(here, str(reason))
        raise UserError(f"not one record of {str(self.records.path)!r} can be trained on; see {str(self.notes)!r}")

    def look_at(self, count: int) -> tuple[int, Counter[str], str]:
        """Read some of the records, from all over the file: how many, why some are bad, and the first one's error.

        The bad ones are noted.
        """
        first = ""
        places = sorted({number * len(self) // count for number in range(count)})
        reasons: Counter[str] = Counter()
        for here in (self.chosen[place] for place in places):
            try:
                self.conversations(self.records[here], self.folder)
            except BadRecord as reason:
                self._note(here, str(reason))
                reasons[str(reason)] += 1
                first = first or str(reason.__cause__ or reason)
        return len(places), reasons, first

    def lengths(self, visual_tokens: int) -> list[int]:
        """About how many tokens each record has, to put rows of like length together: four bytes for a token."""
        return [self.records.size(n) // 4 + visual_tokens * self.records.images(n) for n in self.chosen]

    def _note(self, number: int, reason: str) -> None:
        if number not in self._noted:
            self._noted.add(number)
            note_bad(self.notes, [(self.records.numbers[number], reason)])


def note_bad(notes: Path, bad: Sequence[tuple[int, str]]) -> None:
    """Adds records, by their number in the file, to those that were left out."""
    lines = "".join(write_line({"record": number, "reason": reason}) for number, reason in bad)
    lines = "\n" + lines if _ends_cut(notes) else lines
    with notes.open("ab", buffering=len(lines) + 2) as file:  # all at once: other processes add lines too
        file.write(lines.encode())


def _ends_cut(notes: Path) -> bool:
    """Whether the last line was cut short, by a kill or a full disk."""
    if not notes.exists() or not notes.stat().st_size:
        return False
    with notes.open("rb") as file:
        file.seek(-1, SEEK_END)
        return file.read() != b"\n"


def count_bad(notes: Path) -> Counter[str]:
    """How many records were left out so far, by reason."""
    if not notes.exists():
        return Counter()
    found: dict[int, str] = {}
    for line in read_lines(notes):
        if not line.text.rstrip().endswith(b"}"):
            continue  # it was cut short
        try:
            noted = parse(line.text)
            found[noted["record"]] = noted["reason"]
        except (JsonError, KeyError, TypeError) as error:
            raise UserError(f"{notes}:{line.number} is not a note about a record: {error}; delete the line") from None
    return Counter(found.values())


class Collator:
    """Puts rows together: padded on the right to the longest of them, images one after the other.

    Rows without a single image get one more, `blank`, as in LLaVA's code: encoder and projector then run in every
    forward. With several processes they must, since one that leaves them out lets the others wait for ever.
    """

    def __init__(self, pad_id: int, blank: Mapping[str, Tensor] | None = None) -> None:
        self._blank = blank
        self._fill = {"input_ids": pad_id, "labels": IGNORE}

    def __call__(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        if self._blank is not None and not any(self._blank.keys() <= row.keys() for row in rows):
            rows = [*rows, self._blank]
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            have = [row[name] for row in rows if name in row]  # rows without images lack theirs
            if name in ("input_ids", *PER_TOKEN):
                batch[name] = torch.stack([self._padded(name, value, longest) for value in have])
            else:
                batch[name] = torch.cat(have)
        return batch

    def _padded(self, name: str, value: Tensor, length: int) -> Tensor:
        return torch.nn.functional.pad(value, (0, length - len(value)), value=self._fill.get(name, 0))
