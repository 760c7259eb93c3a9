"""The effect of compressing for one question on the next one: the same questions as first and as second turns.

VisionZip (arXiv:2412.04467) says that text-aware methods do not suit several turns: later questions only get the tokens
that were kept for the first question, while a text-agnostic method keeps the same tokens for every question. Each
question about an image with several questions is asked three times, of the plain model and of both kinds of method at
the same average budgets:

* `first`: as the first question about its image.
* `second`: after another question and the model's answer to it, as a turn of a conversation on the same KV cache.
* `replayed`: as the first question, but with the visual tokens that were kept for the other question. This is only
  measured for the text-aware method; for a text-agnostic one it is equal to `first`.

Second turns are harder for a model that was not trained on them, such as mini, with or without compression. A score is
therefore compared with the plain model's score in the same turn. `extra_loss` is how much more a method loses there
than on first questions, which is due to compression alone. `replayed` has no second turn; it differs from `first` only
in the choice of tokens. Differences are paired; intervals are over images.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import DynamicCache

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.lab.analyses.subject import Row, Subject, Unsuited, interval
from vlmzip.lab.analysis_answers import resumable_records
from vlmzip.lab.configurations import PLAIN
from vlmzip.lab.records import Record, is_text
from vlmzip.lab.stats import Bootstrap, estimate
from vlmzip.lab.study import Study
from vlmzip.lab.tasks.task import Sample, Task
from vlmzip.methods import NoCompression
from vlmzip.processor import InputDict, Processor
from vlmzip.runtime.attach import attach
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.report import ImageReport
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Site, VisualTokens
from vlmzip.visualize.figure import new_figure

TITLE = "What compressing for one question costs the next one about the same image"
log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: A text-agnostic and a text-aware method.
METHODS = "visionzip,fastv"
#: Fractions of the visual tokens, averaged over all LLM layers.
BUDGETS = ("50%", "33%")
FIRST, SECOND, REPLAYED = "first", "second", "replayed"
#: A placeholder for an answer in a chat template.
_ANSWER = "ANSWER"


@dataclass(frozen=True, kw_only=True, eq=False)
class Replayed(Compressor):
    """Keep given tokens of each image at a layer of the LLM, whatever the question. The batch must have equal grids."""

    sites = (Site.IN_LLM,)

    site: Site = Site.IN_LLM
    layer: int
    kept: Bool[Tensor, "images tokens"]

    def assign(self, tokens: VisualTokens) -> TokenMap:
        return TokenMap.keep(self.kept.to(tokens.features.device))


def pairs(samples: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Return pairs of a question and the next question about the same image. The first question follows the last one.

    Every question about an image with several questions is the first of one pair and the second of one pair.
    """
    by_image: dict[str, list[Sample]] = {}
    for sample in samples:
        by_image.setdefault(sample.image, []).append(sample)
    several = [questions for questions in by_image.values() if len(questions) > 1]
    return [(questions[place - 1], sample) for questions in several for place, sample in enumerate(questions)]


def measure(subject: Subject) -> list[Row]:
    study, both = subject.study(), pairs(subject.task.samples)
    if not both:
        raise Unsuited(f"turns needs images with two or more questions; {subject.task.name} has none here")
    if not getattr(subject.processor, "chat_template", None):
        raise Unsuited("turns needs a processor with a chat template to write a second turn")
    bootstrap = Bootstrap([second.image for _, second in both], subject.seed)
    plain = _asked(study, subject.task, NoCompression(), both)
    rows = [_row(bootstrap, PLAIN, "100%", place, plain, plain) for place in (FIRST, SECOND)]
    _, *configurations = study.configure([subject.task], spec.candidates(METHODS), BUDGETS)
    for configuration in configurations:
        method, budget, compressor = configuration.method, configuration.budget, configuration.compressor
        if compressor is None:
            log.info(f"turns skips {method} at {budget}: {configuration.note}")
            continue
        records = _asked(study, subject.task, compressor, both)
        if compressor.text_aware:
            records |= _replayed(study, subject.task, compressor, both)
        rows += [_row(bootstrap, method, budget, place, records, plain) for place in records]
    return rows


# ---------------------------------------------------------------- asking


def _asked(
    study: Study, task: Task, compressor: Compressor, both: Sequence[tuple[Sample, Sample]]
) -> dict[str, list[Record]]:
    """Return the records of each pair's second question, as a first and as a second turn."""
    samples = [dataclasses.replace(second, id=f"{second.id} after {first.id}") for first, second in both]
    settings = {"compressor": compressor.to_dict(), "method": spec.write(compressor)}
    answer = partial(_answer_turns, study, task, compressor, both)
    beside = [[first.question, first.answers] for first, _ in both]
    second = resumable_records(study, task, "turns", settings, samples, answer, beside, _wrong)
    # Each question is the first one of some pair. Its record as a first turn is in that pair's record.
    first = {pair[0].id: _scored(task, pair[0], record["first"]) for pair, record in zip(both, second, strict=True)}
    return {FIRST: [first[pair[1].id] for pair in both], SECOND: second}


def _wrong(record: Record) -> str:
    """Return what is wrong with a record's first answer; an empty text if nothing is."""
    first = record.get("first")
    return "" if isinstance(first, dict) and is_text(first.get("given")) else "its first answer is not a text"


def _scored(task: Task, sample: Sample, record: Record) -> Record:
    """Return an answer with its score."""
    return {**record, "score": task.metric.score(record["given"], sample.answers)}


def _answer_turns(
    study: Study,
    task: Task,
    compressor: Compressor,
    both: Sequence[tuple[Sample, Sample]],
    places: Sequence[int],
) -> list[Record]:
    """Return the records of some pairs, each with two turns on one KV cache."""
    compressed = study.attach(compressor)
    try:
        return converse(study, task, compressed, [both[place] for place in places])
    finally:
        compressed.detach()


def converse(
    study: Study, task: Task, compressed: CompressedModel, some: Sequence[tuple[Sample, Sample]]
) -> list[Record]:
    """Return the answers to the second questions of pairs. Each record has the first question's answer as `first`."""
    inputs = study.answerer.inputs([first.load() for first, _ in some], [first.question for first, _ in some])
    cache, length = DynamicCache(), task.max_new_tokens
    with torch.inference_mode():
        first_ids = compressed.generate(**inputs, max_new_tokens=length, do_sample=False, cache=cache)
        first_ids = first_ids[:, inputs["input_ids"].shape[1] :]
        images = {image.row: image for image in compressed.report.images}
        new = _second_prompts(study, first_ids, [second.question for _, second in some])
        second_ids = compressed.generate(**new, max_new_tokens=length, do_sample=False, cache=cache)
        second_ids = second_ids[:, new["input_ids"].shape[1] :]
    records = []
    answers = [study.processor.batch_decode(ids, skip_special_tokens=True) for ids in (first_ids, second_ids)]
    for row, (pair, first_answer, second_answer) in enumerate(zip(some, *answers, strict=True)):
        counts = list(images[row].by_layer)
        first = {"given": first_answer.strip(), "score": task.metric.score(first_answer.strip(), pair[0].answers)}
        records.append({"given": second_answer.strip(), "visual_tokens_by_layer": counts, "first": first})
    return records


def _second_prompts(study: Study, answers: Tensor, questions: Sequence[str]) -> InputDict:
    """Return the text that the chat template writes after the generated answers, as left-padded token ids."""
    tokenizer, ends = study.processor.tokenizer, study.family.model.generation_config.eos_token_id
    ended = torch.isin(answers, torch.as_tensor([] if ends is None else ends, device=answers.device)).any(1).tolist()
    texts = [_after_answer(study.processor, question) for question in questions]
    # Templates write an end token after an answer. If the model generated it, it is in the cache already.
    end = tokenizer.eos_token or ""
    texts = [text.lstrip().removeprefix(end) if has_end else text for text, has_end in zip(texts, ended, strict=True)]
    new = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    return {name: new[name].to(answers.device) for name in ("input_ids", "attention_mask")}


def _after_answer(processor: Processor, question: str) -> str:
    turns = [("user", ""), ("assistant", _ANSWER), ("user", question)]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    _, found, after = processor.apply_chat_template(messages, add_generation_prompt=True).partition(_ANSWER)
    if not found:
        raise Unsuited("turns cannot use this chat template: it leaves out the assistant's messages")
    return after


def _replayed(
    study: Study, task: Task, compressor: Compressor, both: Sequence[tuple[Sample, Sample]]
) -> dict[str, list[Record]]:
    """Return the records of each pair's second question, answered with the tokens that were kept for the first one."""
    samples = [dataclasses.replace(second, id=f"{second.id} with {first.id}'s") for first, second in both]
    settings = {"compressor": compressor.to_dict(), "method": f"{spec.write(compressor)}, replayed"}
    answer = lambda places: replay(study, task, compressor, [both[place] for place in places])  # noqa: E731
    beside = [first.question for first, _ in both]
    return {REPLAYED: resumable_records(study, task, "turns-replayed", settings, samples, answer, beside)}


def replay(study: Study, task: Task, compressor: Compressor, some: Sequence[tuple[Sample, Sample]]) -> list[Record]:
    """Return the answers to the second questions of pairs, with the tokens that were kept for the first ones."""
    reports = kept_for(study, compressor, [first for first, _ in some])
    if len({report.layout.views for report in reports}) > 1:
        # A compressor gets images of equal grid at a time and could not tell which images of the batch they are.
        return [record for pair in some for record in replay(study, task, compressor, [pair])]
    seconds = [second for _, second in some]
    (layer,) = compressor.layers
    replayed = Replayed(layer=layer, kept=torch.cat(list(map(left, reports))))
    with attach(study.model, replayed) as compressed:
        answers = study.answerer.answer(
            compressed,
            [second.load() for second in seconds],
            [second.question for second in seconds],
            task.max_new_tokens,
        )
    return [{"given": answer.text, "visual_tokens_by_layer": list(answer.by_layer)} for answer in answers]


def kept_for(study: Study, compressor: Compressor, samples: Sequence[Sample]) -> list[ImageReport]:
    """Return the reports of the samples' images, each with its own question."""
    with attach(study.model, compressor) as compressed:
        study.answerer.answer(
            compressed, [sample.load() for sample in samples], [sample.question for sample in samples], 1
        )
        return list(compressed.report.images)


def left(report: ImageReport) -> Bool[Tensor, "1 tokens"]:
    """Mark the tokens that remained of those that an image brought to the LLM."""
    assert report.token_map is not None  # only a resampler has no token map
    return report.token_map.group[:, -report.before :] >= 0


# ---------------------------------------------------------------- summing up


def _row(
    bootstrap: Bootstrap,
    method: str,
    budget: str,
    place: str,
    by_place: dict[str, list[Record]],
    plain: dict[str, list[Record]],
) -> Row:
    def scores(records: Sequence[Record]) -> np.ndarray:
        return bootstrap.share(np.array([record["score"] for record in records], float), np.ones(len(records)))

    here, plain_here = scores(by_place[place]), scores(plain[SECOND if place == SECOND else FIRST])
    loss, loss_first = here - plain_here, scores(by_place[FIRST]) - scores(plain[FIRST])
    counts = np.array([record["visual_tokens_by_layer"] for record in by_place[SECOND]], float)
    row: Row = {"method": method, "budget": budget, "place": place, "questions": len(by_place[place])}
    row |= {"tokens": round(float(counts.mean()), 2)}
    for name, share in {"score": here, "difference": loss, "extra_loss": loss_first - loss}.items():
        row |= interval(name, estimate(100 * share))
    return row


def draw(rows: Sequence[Row], title: str) -> Figure:
    """Draw the scores in each turn (left), and the loss beyond that on first questions (right)."""
    figure = new_figure(10, 4.5)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (3, 2)})
    names = list(dict.fromkeys(_name(row) for row in rows))
    places = {FIRST: "asked first", SECOND: "asked second, same cache", REPLAYED: "asked first, tokens of the other"}
    for shift, (place, label) in zip((-0.25, 0, 0.25), places.items(), strict=True):
        mine = [row for row in rows if row["place"] == place]
        at = [names.index(_name(row)) + shift for row in mine]
        colour = f"C{list(places).index(place)}"
        left.bar(at, [row["score"] for row in mine], 0.23, yerr=_errors(mine, "score"), label=label, color=colour)
        mine = [row for row in mine if place != FIRST and row["method"] != PLAIN]
        at = [names.index(_name(row)) - 1 + shift for row in mine]
        right.errorbar(
            at, [row["extra_loss"] for row in mine], yerr=_errors(mine, "extra_loss"), fmt="o", color=colour
        )  # fmt: skip
    left.set_xticks(range(len(names)), names, fontsize="small")
    left.set(ylabel="score, % (95 % intervals)")
    right.axhline(0, color="0.5", linewidth=1)
    right.set_xticks(range(len(names) - 1), names[1:], fontsize="small")
    right.set(ylabel="loss beyond that on first questions, points", xlim=(-0.6, len(names) - 1.4))
    for axes in (left, right):
        axes.grid(alpha=0.25, axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize="medium")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def _name(row: Row) -> str:
    return "plain" if row["method"] == PLAIN else f"{row['method']}\n{row['budget']}"


def _errors(rows: Sequence[Row], name: str) -> list[list[float]]:
    low, high = ("low", "high") if name == "score" else (f"{name}_low", f"{name}_high")
    return [[row[name] - row[low] for row in rows], [row[high] - row[name] for row in rows]]


def findings(rows: Sequence[Row]) -> list[str]:
    plain = {row["place"]: row["score"] for row in rows if row["method"] == PLAIN}
    sentences = [f"Without compression {plain[FIRST]:.1f} on first questions, {plain[SECOND]:.1f} on second ones."]
    words = {SECOND: "as second turns", REPLAYED: "with the tokens kept for another question"}
    for row in rows:
        if row["method"] != PLAIN and row["place"] in words:
            sentences.append(
                f"{row['method']} at {row['budget']} {words[row['place']]}: {row['difference']:+.1f} points compared"
                f" with the plain model, where first questions have {row['difference'] + row['extra_loss']:+.1f}; extra"
                f" loss {row['extra_loss']:.1f} (95 %: {row['extra_loss_low']:.1f} to {row['extra_loss_high']:.1f})."
            )
    return sentences
