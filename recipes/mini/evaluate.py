"""`python -m recipes.mini.evaluate`: measure exact-match accuracy by question type and by level, with controls."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from vlmzip.mini import weights_folder
from vlmzip.mini.questions import MOST_NEW_TOKENS, ImageQuestion
from vlmzip.mini.rng import Rng
from vlmzip.mini.splits import test_split, validation_split
from vlmzip.mini.words import LEVELS, TYPES, normalized

if TYPE_CHECKING:
    from torch import nn
    from transformers import ProcessorMixin

Answer = Callable[[list[Image.Image], list[str]], list[str]]
CONTROLS = ("none", "text-only", "shuffled", "downsampled")
SMALL = 32  # side in pixels of the down-sampled control's images


@dataclass(frozen=True)
class AnswerRecord:
    """An answered question."""

    image: int
    question: str
    answer: str
    given: str
    type: str
    level: str

    @property
    def right(self) -> bool:
        return normalized(self.given) == normalized(self.answer)


def accuracy(answer: Answer, samples: Sequence[ImageQuestion], batch: int = 60) -> list[AnswerRecord]:
    """Answer all questions, `batch` at a time. `share_right`, `by` and `table` summarize the records."""
    records = []
    for start in range(0, len(samples), batch):
        some = samples[start : start + batch]
        given = answer([sample.image for sample in some], [sample.question for sample in some])
        if len(given) != len(some):
            raise ValueError(f"{len(some)} questions were asked, {len(given)} answers came back")
        for sample, text in zip(some, given, strict=True):
            records.append(AnswerRecord(sample.seed, sample.question, sample.answer, text, sample.type, sample.level))
    return records


def share_right(records: Sequence[AnswerRecord]) -> float:
    return sum(record.right for record in records) / len(records) if records else float("nan")


def by(records: Sequence[AnswerRecord], field: str) -> dict[str, float]:
    """Return the share of right answers for each "type" or "level" that occurs, in the order of `words`."""
    groups = {value: [record for record in records if getattr(record, field) == value] for value in (*TYPES, *LEVELS)}
    return {value: share_right(group) for value, group in groups.items() if group}


def majority(samples: Sequence[ImageQuestion | AnswerRecord]) -> dict[str, float]:
    """Return the accuracy of always giving the most frequent answer of each type."""
    shares = {}
    for question_type in TYPES:
        answers = Counter(sample.answer for sample in samples if sample.type == question_type)
        if answers:
            shares[question_type] = max(answers.values()) / sum(answers.values())
    return shares


def table(records: Sequence[AnswerRecord]) -> str:
    """Return a Markdown table of accuracies in percent by type (rows) and level (columns).

    It also has the number of questions and the accuracy of the majority guesser.
    """
    guess = majority(records)
    lines = [f"| type | n | all | {' | '.join(LEVELS)} | majority |", "| --- " * (4 + len(LEVELS)) + "|"]
    for question_type in (*TYPES, "all"):
        mine = [record for record in records if question_type in (record.type, "all")]
        if not mine:
            continue
        levels = [share_right([record for record in mine if record.level == level]) for level in LEVELS]
        cells = [f"{100 * share:.1f}" for share in (share_right(mine), *levels)]
        most = f"{100 * guess[question_type]:.1f}" if question_type in guess else ""
        lines.append(f"| {question_type} | {len(mine)} | {' | '.join(cells)} | {most} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- a model as an `Answer`


class ModelAnswer:
    """Answers questions with a model and its processor, by greedy decoding on the model's device."""

    def __init__(self, model: "nn.Module", processor: "ProcessorMixin") -> None:
        self.model, self.processor = model, processor

    def __call__(self, images: list[Image.Image], questions: list[str]) -> list[str]:
        import torch

        prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in questions]
        inputs = self.processor(images=images, text=prompts, padding=True, return_tensors="pt")
        parameter = next(self.model.parameters())
        inputs = inputs.to(parameter.device, parameter.dtype)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=MOST_NEW_TOKENS, do_sample=False)  # type: ignore[operator]
        return self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# ---------------------------------------------------------------- controls


def controlled(samples: Sequence[ImageQuestion], control: str) -> list[ImageQuestion]:
    """Return the same questions with other images: grey ones, others of the split, or blurred ones.

    The "downsampled" control shrinks images to 32 x 32 pixels and enlarges them again.
    """
    if control == "none":
        return list(samples)
    return [
        ImageQuestion(sample.seed, image, sample.question, sample.answer, sample.type, sample.level)
        for sample, image in zip(samples, _other_images(samples, control), strict=True)
    ]


def _other_images(samples: Sequence[ImageQuestion], control: str) -> list[Image.Image]:
    if control == "text-only":
        return [Image.new("RGB", sample.image.size, (128, 128, 128)) for sample in samples]
    if control == "downsampled":
        return [_shrunk(sample.image) for sample in samples]
    images = {sample.seed: sample.image for sample in samples}
    seeds = list(images)
    if len(seeds) < 2:
        raise ValueError("the shuffled control needs questions about at least two images")
    rng = Rng(0)
    # Take any image except the question's: go 1 to n-1 steps around the circle of seeds.
    place = {seed: number for number, seed in enumerate(seeds)}
    steps = [rng.between(1, len(seeds) - 1) for _ in samples]
    return [
        images[seeds[(place[sample.seed] + step) % len(seeds)]] for sample, step in zip(samples, steps, strict=True)
    ]


def _shrunk(image: Image.Image) -> Image.Image:
    small = image.resize((SMALL, SMALL), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BICUBIC)


# ---------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m recipes.mini.evaluate", description=__doc__)
    parser.add_argument("--model", type=Path, default=weights_folder(), help="folder of the model (default: mini)")
    parser.add_argument("--split", choices=("test", "validation"), default="test")
    parser.add_argument("--limit", type=int, help="ask only the first questions")
    parser.add_argument("--control", choices=CONTROLS, default="none", help="replace the images")
    parser.add_argument("--json", type=Path, help="write every answer to this file")
    given = parser.parse_args(arguments)
    if not (given.model / "config.json").exists():
        print(f"{given.model} is not a model's folder: config.json is missing", file=sys.stderr)
        return 2
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(given.model).eval()
    processor = AutoProcessor.from_pretrained(given.model)
    split = test_split if given.split == "test" else validation_split
    records = accuracy(ModelAnswer(model, processor), controlled(split(given.limit), given.control))
    print(f"split {given.split}, control {given.control}")
    print(table(records))
    if given.json is not None:
        write_json(records, given.json, split=given.split, control=given.control)
    return 0


def write_json(records: Sequence[AnswerRecord], path: Path, **about: str) -> None:
    content = {
        **about,
        "all": share_right(records),
        "by_type": by(records, "type"),
        "by_level": by(records, "level"),
        "records": [{**asdict(record), "right": record.right} for record in records],
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
