"""What compression for one question leaves for the next: the same questions asked first, and as a second turn.

VisionZip (arXiv:2412.04467) says that text-aware methods do not suit several turns: what was kept for the first
question is all that later ones get, while a text-agnostic method keeps the same for every question. Each question about
an image with several is asked three times, of the plain model and of both kinds of method at the same average budgets:

* `first`: as the first question about its image.
* `second`: after another question and the model's own answer, as a turn of a real conversation on the same KV cache.
* `replayed`: as the first question, but with the visual tokens that were kept for the other question. Only for the
  text-aware method: a text-agnostic one keeps the same, and its row would be `first` again.

Second turns are harder for a model that was not trained on them, such as mini, compressed or not. So a score is
compared with the plain model's in the same place, and `extra_loss` is how much more a method loses there than on first
questions: what is due to compression alone. `replayed` does without second turns; there is only the choice of tokens
between it and `first`. Differences are paired; intervals are over images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import DynamicCache

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.lab.analyses.subject import Row, Subject, Unsuited
from vlmzip.lab.configurations import PLAIN
from vlmzip.lab.kept import kept
from vlmzip.lab.records import Record, is_text
from vlmzip.lab.stats import Bootstrap, Estimate, estimate
from vlmzip.lab.study import Study
from vlmzip.lab.tasks.task import Sample, Task
from vlmzip.methods import NoCompression
from vlmzip.processor import Processor
from vlmzip.runtime.attach import attach
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.report import ImageReport
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Site, VisualTokens
from vlmzip.visualize.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: One that does not look at the question, and one that does.
METHODS = "visionzip,fastv"
#: Shares of the visual tokens, mean over all layers of the LLM.
BUDGETS = ("50%", "33%")
FIRST, SECOND, REPLAYED = "first", "second", "replayed"
#: Stands for an answer where only what follows it is wanted.
_ANSWER = "ANSWER"


@dataclass(frozen=True, kw_only=True, eq=False)
class Replayed(Compressor):
    """Keeps, at a layer of the LLM, given tokens of each image in a batch of equal grids, whatever the question."""

    sites = (Site.IN_LLM,)

    site: Site = Site.IN_LLM
    layer: int
    kept: Bool[Tensor, "images tokens"]

    def assign(self, tokens: VisualTokens) -> TokenMap:
        return TokenMap.keep(self.kept.to(tokens.features.device))


def pairs(samples: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """For each question about an image with several the one before it, and itself; the last comes before the first.

    So every question stands in both places once.
    """
    about: dict[str, list[Sample]] = {}
    for sample in samples:
        about.setdefault(sample.image, []).append(sample)
    return [(own[place - 1], sample) for own in about.values() if len(own) > 1 for place, sample in enumerate(own)]


def measure(subject: Subject) -> list[Row]:
    study, both = subject.study(), pairs(subject.task.samples)
    if not both:
        raise Unsuited(f"turns needs images with two questions or more; {subject.task.name} has none here")
    if not getattr(subject.processor, "chat_template", None):
        raise Unsuited("turns needs a processor with a chat template, which says how a second turn is written")
    bootstrap = Bootstrap([second.image for _, second in both], subject.seed)
    plain = _asked(study, subject.task, NoCompression(), both)
    rows = [_row(bootstrap, PLAIN, "100%", place, plain, plain) for place in (FIRST, SECOND)]
    _, *configurations = study.configure([subject.task], spec.candidates(METHODS), BUDGETS)
    for one in configurations:
        if one.compressor is None:
            study.tell(f"turns goes without {one.method} at {one.budget}: {one.note}")
            continue
        found = _asked(study, subject.task, one.compressor, both)
        if one.compressor.text_aware:
            found |= _replayed(study, subject.task, one.compressor, both)
        rows += [_row(bootstrap, one.method, one.budget, place, found, plain) for place in found]
    return rows


# ---------------------------------------------------------------- asking


def _asked(
    study: Study, task: Task, compressor: Compressor, both: Sequence[tuple[Sample, Sample]]
) -> dict[str, list[Record]]:
    """The records of each pair's second question where it came first, and where it came second."""
    samples = [dataclasses.replace(second, id=f"{second.id} after {first.id}") for first, second in both]
    settings = {"compressor": compressor.to_dict(), "method": spec.write(compressor)}
    answer = partial(_answer_turns, study, task, compressor, both)
    beside = [[first.question, first.answers] for first, _ in both]
    second = kept(study, task, "turns", settings, samples, answer, beside, _wrong)
    # A pair's first question is the second of another pair; there it is wanted.
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
    """Two turns on one KV cache for each pair."""
    compressed = study.attach(compressor)
    try:
        return converse(study, task, compressed, [both[place] for place in places])
    finally:
        compressed.detach()


def converse(
    study: Study, task: Task, compressed: CompressedModel, some: Sequence[tuple[Sample, Sample]]
) -> list[Record]:
    """The answers to the second questions of pairs, with that to the first as `first`."""
    inputs = study.answerer.inputs([first.load() for first, _ in some], [first.question for first, _ in some])
    generate: dict[str, Any] = {"max_new_tokens": task.max_new_tokens, "do_sample": False, "cache": DynamicCache()}
    with torch.inference_mode():
        told = compressed.generate(**inputs, **generate)[:, inputs["input_ids"].shape[1] :]
        images = {image.row: image for image in compressed.report.images}
        new = _second_prompts(study, told, [second.question for _, second in some])
        more = compressed.generate(**new, **generate)[:, new["input_ids"].shape[1] :]
    out = []
    answers = [study.processor.batch_decode(ids, skip_special_tokens=True) for ids in (told, more)]
    for row, (pair, said, then) in enumerate(zip(some, *answers, strict=True)):
        counts = list(images[row].by_layer)
        first = {"given": said.strip(), "score": task.metric.score(said.strip(), pair[0].answers)}
        out.append({"given": then.strip(), "visual_tokens_by_layer": counts, "first": first})
    return out


def _second_prompts(study: Study, told: Tensor, questions: Sequence[str]) -> dict[str, Any]:
    """What follows the generated answers, as the chat template writes it; padded on the left."""
    tokenizer, ends = study.processor.tokenizer, study.adapter.model.generation_config.eos_token_id
    ended = torch.isin(told, torch.as_tensor([] if ends is None else ends, device=told.device)).any(1).tolist()
    texts = [_after_answer(study.processor, question) for question in questions]
    # The end of an answer, which templates write, is in the cache already where the model said it.
    end = tokenizer.eos_token or ""
    texts = [text.lstrip().removeprefix(end) if said else text for text, said in zip(texts, ended, strict=True)]
    new = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    return {name: new[name].to(told.device) for name in ("input_ids", "attention_mask")}


def _after_answer(processor: Processor, question: str) -> str:
    turns = [("user", ""), ("assistant", _ANSWER), ("user", question)]
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    _, found, after = processor.apply_chat_template(messages, add_generation_prompt=True).partition(_ANSWER)
    if not found:
        raise Unsuited("turns cannot use this chat template: it does not write what the assistant said")
    return after


def _replayed(
    study: Study, task: Task, compressor: Compressor, both: Sequence[tuple[Sample, Sample]]
) -> dict[str, list[Record]]:
    """The records of each pair's second question with the tokens that were kept for the first."""
    samples = [dataclasses.replace(second, id=f"{second.id} with {first.id}'s") for first, second in both]
    settings = {"compressor": compressor.to_dict(), "method": f"{spec.write(compressor)}, replayed"}
    answer = lambda places: replay(study, task, compressor, [both[place] for place in places])  # noqa: E731
    beside = [first.question for first, _ in both]
    return {REPLAYED: kept(study, task, "turns-replayed", settings, samples, answer, beside)}


def replay(study: Study, task: Task, compressor: Compressor, some: Sequence[tuple[Sample, Sample]]) -> list[Record]:
    """The answers to the second questions of pairs, from the tokens that were kept for the first ones."""
    reports = kept_for(study, compressor, [first for first, _ in some])
    if len({report.layout.views for report in reports}) > 1:
        # A compressor is asked about each grid of a batch by itself, and would not know whose tokens those are.
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
    """What became of the samples' images, each asked its own question."""
    with attach(study.model, compressor) as compressed:
        study.answerer.answer(
            compressed, [sample.load() for sample in samples], [sample.question for sample in samples], 1
        )
        return list(compressed.report.images)


def left(report: ImageReport) -> Bool[Tensor, "1 tokens"]:
    """Which of the tokens that an image brought to the LLM were left of it."""
    assert report.token_map is not None  # only a resampler leaves none
    return report.token_map.group[:, -report.before :] >= 0


# ---------------------------------------------------------------- summing up


def _row(
    bootstrap: Bootstrap,
    method: str,
    budget: str,
    place: str,
    found: dict[str, list[Record]],
    plain: dict[str, list[Record]],
) -> Row:
    def scores(records: Sequence[Record]) -> np.ndarray:
        return bootstrap.share(np.array([record["score"] for record in records], float), np.ones(len(records)))

    here, among = scores(found[place]), scores(plain[SECOND if place == SECOND else FIRST])
    loss, loss_first = here - among, scores(found[FIRST]) - scores(plain[FIRST])
    counts = np.array([record["visual_tokens_by_layer"] for record in found[SECOND]], float)
    row: Row = {"method": method, "budget": budget, "place": place, "questions": len(found[place])}
    row |= {"tokens": round(float(counts.mean()), 2)}
    for name, share in {"": here, "difference": loss, "extra_loss": loss_first - loss}.items():
        row |= _columns(name, estimate(100 * share))
    return row


def _columns(name: str, share: Estimate) -> Row:
    names = (f"{name}_low", f"{name}_high") if name else ("low", "high")
    return {name or "score": round(share.value, 2), names[0]: round(share.low, 2), names[1]: round(share.high, 2)}


def draw(rows: Sequence[Row], title: str) -> Figure:
    """Scores in each place, and beside them how much more is lost there than on first questions."""
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
    said = [f"Without compression {plain[FIRST]:.1f} on first questions, {plain[SECOND]:.1f} on second ones."]
    words = {SECOND: "as second turns", REPLAYED: "with the tokens kept for another question"}
    for row in rows:
        if row["method"] != PLAIN and row["place"] in words:
            said.append(
                f"{row['method']} at {row['budget']} {words[row['place']]}: {row['difference']:+.1f} points beside the"
                f" plain model, where first questions have {row['difference'] + row['extra_loss']:+.1f}; extra loss"
                f" {row['extra_loss']:.1f} (95 %: {row['extra_loss_low']:.1f} to {row['extra_loss_high']:.1f})."
            )
    return said
