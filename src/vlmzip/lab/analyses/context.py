"""How many images fit the context, and the score of questions about one of several images.

LLaVA-Zip (arXiv:2412.08771) promises that fewer tokens per image make room for several images and for video frames.

* `fits` is arithmetic: how many images fit the model's positions with the text, at each budget. It covers the task's
  images, and LLaVA-1.5's images and Video-LLaVA's frames in the 4,096 positions of Vicuna. If kept tokens keep their
  positions (`positions="original"`, and inside the LLM), compression saves computation and cache but no positions.
* `asked` is measured: every question of the task, about the first or the last of n images. The other images are those
  that follow in the task. n grows as long as the images fit. The prompt says which image is meant. If the tokenizer
  does not know the words for this, only the position in the prompt identifies the image.

`difference` is the paired difference from the same method with one image. Intervals are over the images that the
questions are about.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.keep import count_to_keep
from vlmzip.lab.analyses.subject import Row, Subject, Unsuited, interval
from vlmzip.lab.analysis_answers import resumable_records
from vlmzip.lab.bench.presets import PRESETS
from vlmzip.lab.configurations import WHOLE, Configuration
from vlmzip.lab.records import Record
from vlmzip.lab.stats import Bootstrap, estimate
from vlmzip.lab.study import Study
from vlmzip.lab.tasks.task import Sample, Task
from vlmzip.processor import Processor
from vlmzip.runtime.position_limit import llm_positions
from vlmzip.visualize.figure import new_figure

TITLE = "How many images fit the context, and the score of questions about one of them"
log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FITS, ASKED = "fits", "asked"
BUDGETS = (WHOLE, "50%", "25%", "11%")
METHODS, BUDGET = "visionzip,dfmr", "25%"
COUNTS = (1, 2, 4, 8)
ONLY, FIRST, LAST = "only", "first", "last"
#: The prompt of a question about one of several images.
STATED = "Image {number} of {count}: {question}"
#: Positions of Vicuna 1.5, and positions for question and answer, for the images and frames of `TYPICAL`.
POSITIONS, TEXT = 4096, 128
TYPICAL = {"LLaVA-1.5 image": "llava-1.5-7b", "Video-LLaVA frame": "video-llava-7b"}


def measure(subject: Subject) -> list[Row]:
    study = subject.study()
    configurations = study.configure([subject.task], spec.candidates(METHODS), [BUDGET])
    tokens, room, between = _room(study, subject.task)
    rows = list(_fits("this model's image", tokens, room, between))
    for name, preset in TYPICAL.items():
        frame = PRESETS[preset].visual_tokens // PRESETS[preset].images
        rows += _fits(name, frame, POSITIONS - TEXT, 0)
    bootstrap = Bootstrap([sample.image for sample in subject.task.samples], subject.seed)
    for configuration in configurations:
        if configuration.compressor is None:
            log.info(f"context skips {configuration.method} at {configuration.budget}: {configuration.note}")
            continue
        most = fitting(count_to_keep(configuration.budget, tokens), room, between)
        rows += _asked(study, subject.task, configuration, bootstrap, most)
    return rows


# ---------------------------------------------------------------- what fits


def _room(study: Study, task: Task) -> tuple[int, int, int]:
    """Return the visual tokens of an image, the positions for images, and the text tokens of each further image.

    The positions for images are those left by the longest question and its answer. The task's first image represents
    all images.
    """
    image = task.samples[0].load()

    def counts(count: int) -> tuple[int, int]:
        inputs = study.answerer.inputs([image] * count, [longest])
        visual = sum(study.family.plain_counts(inputs))
        return visual, int(inputs["attention_mask"].sum()) - visual

    longest = max(task.samples, key=lambda sample: len(study.processor.tokenizer(sample.question).input_ids)).question
    (tokens, text), (_, more) = counts(1), counts(2)
    positions = llm_positions(study.family)
    if positions is None:
        raise Unsuited("the LLM's config does not say how many positions it has")
    return tokens, positions - task.max_new_tokens - text + (more - text), more - text


def fitting(tokens: int, room: int, between: int) -> int:
    """Return how many images of `tokens` visual tokens, each with `between` text tokens, fit into `room` positions."""
    return max(room // (tokens + between), 0)


def _fits(what: str, tokens: int, room: int, between: int) -> Iterator[Row]:
    for budget in BUDGETS:
        each = count_to_keep(budget, tokens)
        yield _row(FITS, what=what, budget=budget, tokens=each, images=fitting(each, room, between))


# ---------------------------------------------------------------- what is answered


def _asked(study: Study, task: Task, configuration: Configuration, bootstrap: Bootstrap, most: int) -> Iterator[Row]:
    """Yield a method's rows for all numbers of images up to `most`, with the image of the question first and last."""
    compressor = configuration.chosen
    images = {sample.image: sample for sample in task.samples}
    alone: np.ndarray | None = None
    for count in COUNTS:
        if count > min(most, len(images)):
            return
        for place in (ONLY,) if count == 1 else (FIRST, LAST):
            settings: dict[str, object] = {"compressor": compressor.to_dict(), "method": spec.write(compressor)}
            settings |= {"images": count, "place": place}
            answer = partial(_answer, study, task, compressor, count, place)
            beside = [[other.pixels for other in following(task.samples, sample, count - 1)] for sample in task.samples]
            records = resumable_records(study, task, "context", settings, _named(task.samples, count), answer, beside)
            scores = np.array([record["score"] for record in records], float)
            drawn = bootstrap.share(scores, np.ones(len(records)))
            alone = drawn if alone is None else alone
            tokens = np.mean([record["visual_tokens_by_layer"] for record in records]) / count
            yield _row(
                ASKED, what="this model's image", method=configuration.method, budget=configuration.budget,
                tokens=round(float(tokens), 2), images=count, place=place,
                stated="yes" if says_which(study.processor, count) else "no", questions=len(records),
                **interval("score", estimate(100 * drawn)), **interval("difference", estimate(100 * (drawn - alone))),
            )  # fmt: skip


def _answer(
    study: Study, task: Task, compressor: Compressor, count: int, place: str, places: Sequence[int]
) -> list[Record]:
    """Return the answers to some of the task's questions, each about one of `count` images."""
    samples = [task.samples[number] for number in places]
    images = [image for sample in samples for image in arranged(task.samples, sample, count, place)]
    number = count if place == LAST else 1
    questions = [question(study.processor, sample, number, count) for sample in samples]
    compressed = study.attach(compressor)
    try:
        answers = study.answerer.answer(compressed, images, questions, task.max_new_tokens)
    finally:
        compressed.detach()
    return [{"given": answer.text, "visual_tokens_by_layer": list(answer.by_layer)} for answer in answers]


def arranged(samples: Sequence[Sample], asked: Sample, count: int, place: str) -> list[Image.Image]:
    """Return `count` images: the image of the question, first or last, and the images that follow it in the task.

    The task's first image follows its last one.
    """
    others = [sample.load() for sample in following(samples, asked, count - 1)]
    return [*others, asked.load()] if place == LAST else [asked.load(), *others]


def following(samples: Sequence[Sample], asked: Sample, count: int) -> list[Sample]:
    """Return the first question about each of the `count` images that follow the image of the question."""
    images: dict[str, Sample] = {}
    for sample in samples:
        images.setdefault(sample.image, sample)
    names = list(images)
    start = names.index(asked.image)
    return [images[names[(start + step) % len(names)]] for step in range(1, count + 1)]


def _named(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return the samples with ids that also name the other images of the prompt.

    The last questions of a task are combined with its first images. With another `--limit` they are combined with other
    images, and their answers must not be reused.
    """
    others = {sample.id: [other.id for other in following(samples, sample, count - 1)] for sample in samples}
    return [dataclasses.replace(sample, id=" with ".join([sample.id, *others[sample.id]])) for sample in samples]


def says_which(processor: Processor, count: int) -> bool:
    """Return whether the prompt says which image is meant: there are several, and the tokenizer knows the words."""
    tokenizer = processor.tokenizer
    words = tokenizer(STATED.format(number=1, count=count, question=""), add_special_tokens=False).input_ids
    return count > 1 and tokenizer.unk_token_id not in words


def question(processor: Processor, sample: Sample, number: int, count: int) -> str:
    """Return the question about image `number` of `count`, 1-based."""
    if not says_which(processor, count):
        return sample.question
    return STATED.format(number=number, count=count, question=sample.question)


# ---------------------------------------------------------------- what is shown


def _row(part: str, **values: object) -> Row:
    """Return a row of the table. Columns without a value are empty."""
    names = ["what", "method", "budget", "tokens", "images", "place", "stated", "questions"]
    names += ["score", "low", "high", "difference", "difference_low", "difference_high"]
    return {"part": part, **{name: values.get(name, "") for name in names}}


def draw(rows: Sequence[Row], title: str) -> Figure:
    """Draw the number of images that fit at each budget (left) and the score by number of images (right)."""
    figure = new_figure(10, 4.5)
    left, right = figure.subplots(1, 2)
    fits = [row for row in rows if row["part"] == FITS]
    for number, what in enumerate(dict.fromkeys(row["what"] for row in fits)):
        mine = [row for row in fits if row["what"] == what]
        at = [place + 0.27 * (number - 1) for place in range(len(mine))]
        bars = left.bar(at, [row["images"] for row in mine], 0.25, label=what, color=f"C{number + 4}")
        left.bar_label(bars, fontsize="x-small")
    left.set_xticks(range(len(BUDGETS)), BUDGETS)
    left.set(xlabel="visual tokens kept", ylabel="images that fit the context")
    left.legend(frameon=False, fontsize="small")
    _draw_scores(right, [row for row in rows if row["part"] == ASKED])
    for axes in (left, right):
        axes.grid(alpha=0.25, axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    return figure


def _draw_scores(axes: Axes, asked: Sequence[Row]) -> None:
    for number, method in enumerate(dict.fromkeys(row["method"] for row in asked)):
        mine = [row for row in asked if row["method"] == method]
        for place, line in ((LAST, "-"), (FIRST, "--")):
            points = [row for row in mine if row["place"] in (ONLY, place)]
            errors = [
                [row["score"] - row["low"] for row in points],
                [row["high"] - row["score"] for row in points],
            ]
            axes.errorbar(
                [row["images"] * 1.02 ** (number - 1.5) for row in points], [row["score"] for row in points],
                yerr=errors, color=f"C{number}", linestyle=line, marker="o", markersize=4, elinewidth=0.8,
                label=f"{method}, {mine[0]['budget']}: {place}",
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    counts = sorted({row["images"] for row in asked})
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set(
        xlabel="images in the prompt, the asked one first or last", ylabel="score, % (95 % intervals)", ylim=(0, 105)
    )
    axes.legend(frameon=False, fontsize="x-small", ncols=2, handlelength=4)


def findings(rows: Sequence[Row]) -> list[str]:
    fits = [row for row in rows if row["part"] == FITS and row["what"] == rows[0]["what"]]
    counts = ", ".join(f"{row['images']} images at {row['budget']}" for row in fits)
    sentences = [f"This model's context holds {counts}."]
    asked = [row for row in rows if row["part"] == ASKED]
    for method in dict.fromkeys(row["method"] for row in asked):
        mine = [row for row in asked if row["method"] == method]
        parts = [f"{row['score']:.1f} for {row['images']} ({row['place']})" for row in mine]
        sentences.append(f"{method} at {mine[0]['budget']}: " + ", ".join(parts) + ".")
    if any(row["stated"] == "no" for row in asked if row["images"] > 1):
        sentences.append("The prompt does not say which image is meant: this tokenizer does not know the words for it.")
    return sentences
