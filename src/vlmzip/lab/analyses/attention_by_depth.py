"""How much of an answer's attention goes to visual tokens, layer by layer of the LLM.

LLaVolta (arXiv:2406.20092, Figure 1) and FastV (arXiv:2403.06764) find that this share falls with depth, and therefore
compress inside the LLM. This analysis reads the attention rows that produce the tokens of the model's greedy answer:
first the row of the prompt's last token, then those of the answer's tokens. The row that produces the end-of-answer
token is left out, unless the answer is empty. For each row, the share of attention on visual tokens is averaged over
heads, then over the answer, then over questions. It is compared with the share of a uniform row over the tokens that
the row may attend to. Intervals are over images.

No attention matrix is computed: the rows come from one layer's queries and keys, as for compressors inside the LLM.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlmzip.lab.analyses.subject import Row, Subject, Unsuited, interval
from vlmzip.lab.analysis_answers import resumable_records
from vlmzip.lab.records import Record, is_count, is_list, is_number
from vlmzip.lab.stats import Bootstrap, estimate
from vlmzip.lab.study import Study
from vlmzip.lab.tasks.task import Task
from vlmzip.methods import NoCompression
from vlmzip.models.family import Family
from vlmzip.models.recording import attention_rows
from vlmzip.processor import InputDict
from vlmzip.runtime.cache_names import cache_argument
from vlmzip.runtime.fitting import has_sliding_windows
from vlmzip.runtime.position_limit import warn_beyond
from vlmzip.runtime.versions import argument
from vlmzip.visualize.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


TITLE = "How much of an answer's attention goes to visual tokens"


def measure(subject: Subject) -> list[Row]:
    study = subject.study()
    if has_sliding_windows(study.family):
        raise Unsuited("attention_by_depth cannot read this LLM: it has layers with sliding windows")
    answer = partial(_answer, study, subject.task)
    settings = {"compressor": NoCompression().to_dict()}
    check = partial(_wrong, len(study.family.decoder_layers))
    records = resumable_records(
        study, subject.task, "attention_by_depth", settings, subject.task.samples, answer, check=check
    )
    bootstrap, ones = Bootstrap([r["image"] for r in records], subject.seed), np.ones(len(records))
    uniform = 100 * float(np.mean([record["uniform"] for record in records]))
    rows = []
    for layer, shares in enumerate(np.array([record["attention"] for record in records]).T):
        share = estimate(100 * bootstrap.share(shares, ones))
        rows.append(
            {
                "layer": layer,
                **interval("attention", share),
                "uniform": round(uniform, 2),
                "times_uniform": round(share.value / uniform, 4),
                "visual_tokens": round(float(np.mean([r["visual_tokens_by_layer"][layer] for r in records])), 2),
                "answer_tokens": round(float(np.mean([r["answer_tokens"] for r in records])), 2),
                "questions": len(records),
            }
        )
    return rows


def _answer(study: Study, task: Task, places: Sequence[int]) -> list[Record]:
    """Return the plain model's answers to some of the task's samples, with the attention shares of each answer."""
    samples = [task.samples[place] for place in places]
    inputs = study.answerer.inputs([sample.load() for sample in samples], [sample.question for sample in samples])
    prompt = inputs["input_ids"]
    visual = prompt == study.family.placeholder_id
    warn_beyond(study.family, NoCompression(), inputs["attention_mask"].sum(1).tolist(), original=False)
    with torch.inference_mode(), reading(study.family, visual) as read:
        model = study.family.model
        ids = model.generate(**inputs, max_new_tokens=task.max_new_tokens, do_sample=False)[:, prompt.shape[1] :]
    counts = says_something(ids, model.generation_config.eos_token_id)
    attention, uniform = read.over(counts)
    texts = study.processor.batch_decode(ids, skip_special_tokens=True)
    layers = len(study.family.decoder_layers)
    columns = zip(
        texts, attention.tolist(), uniform.tolist(), counts.sum(1).tolist(), visual.sum(1).tolist(), strict=True
    )
    return [
        {
            "given": text.strip(),
            "visual_tokens_by_layer": [tokens] * layers,
            "attention": shares,
            "uniform": even,
            "answer_tokens": steps,
        }
        for text, shares, even, steps, tokens in columns
    ]


def _wrong(layers: int, record: Record) -> str:
    """Return what is wrong with a record's attention; an empty text if nothing is."""
    if not is_list(record.get("attention"), _is_about_a_share) or len(record["attention"]) != layers:
        return f"its attention is not a number from 0 to 1 for each of {layers} layers"
    if not _is_about_a_share(record.get("uniform")) or not record["uniform"]:
        return "its uniform is not a number above 0, up to 1"
    return "" if is_count(record.get("answer_tokens")) else "its answer_tokens is not a whole number"


def _is_about_a_share(value: object) -> bool:
    return is_number(value) and 0 <= value < 1.001  # rounding can bring it above 1


def says_something(tokens: Int[Tensor, "batch steps"], end: int | list[int] | None) -> Bool[Tensor, "batch steps"]:
    """Mark the generated tokens that belong to the answer: all before the end token, and always the first one."""
    ends = torch.as_tensor([] if end is None else end, device=tokens.device)
    answer = torch.isin(tokens, ends).cumsum(1) == 0
    answer[:, 0] = True
    return answer


@dataclass
class Read:
    """The attention shares of a call of `generate`: a list for each layer, with an entry for each step."""

    visual: Bool[Tensor, "batch prompt"]
    shares: list[list[Float[Tensor, " batch"]]]
    uniform: list[Float[Tensor, " batch"]] = field(default_factory=list)

    def over(
        self, counts: Bool[Tensor, "batch steps"]
    ) -> tuple[Float[Tensor, "batch layers"], Float[Tensor, " batch"]]:
        """Return the mean shares, and the mean shares of uniform rows, over the steps of each row that count."""
        counts = counts.cpu()  # `look` moves shares to the CPU, too
        shares = torch.stack([torch.stack(steps, -1) for steps in self.shares], 1)
        uniform, among = torch.stack(self.uniform, -1), counts.sum(-1)
        return (shares * counts[:, None]).sum(-1) / among[:, None], (uniform * counts).sum(-1) / among

    def look(
        self, index: int, family: Family, layer: nn.Module, args: tuple[Tensor, ...], arguments: InputDict
    ) -> None:
        """Read the newest token's attention row at layer `index`, which is about to run with these arguments."""
        hidden = args[0] if args else arguments["hidden_states"]
        last = torch.full((len(hidden), 1), hidden.shape[1] - 1, device=hidden.device)
        query, key, scale = family.queries_and_keys(layer, hidden, arguments, last)
        cache = cache_argument(arguments, "a decoder layer")
        if cache is not None and cache.get_seq_length(index):
            key = torch.cat([cache.layers[index].keys, key], 2)
        allowed = _allowed(argument(arguments, "attention_mask", "a decoder layer"), len(hidden), key.shape[2]).to(
            key.device
        )
        rows = attention_rows(query, key, allowed, scale)
        visual = nn.functional.pad(self.visual, (0, key.shape[2] - self.visual.shape[1])).to(key.device)
        self.shares[index].append((rows[:, 0] * visual).sum(-1).cpu())
        if index == 0:
            self.uniform.append(((allowed[:, 0] & visual).sum(-1) / allowed[:, 0].sum(-1)).cpu())


def _allowed(mask: Tensor | None, batch: int, keys: int) -> Bool[Tensor, "batch 1 keys"]:
    """Mark the tokens that the newest token may attend to, for each form of mask that transformers gives a layer."""
    if mask is None:
        return torch.ones(batch, 1, keys, dtype=torch.bool)
    row = mask[:, None] if mask.ndim == 2 else mask[:, 0, -1:]
    row = row > torch.finfo(row.dtype).min / 2 if row.is_floating_point() else row.bool()
    return row.expand(batch, 1, keys)


@contextmanager
def reading(family: Family, visual: Bool[Tensor, "batch prompt"]) -> Iterator[Read]:
    """Record attention shares while the model generates inside the block, once. All hooks are removed at the end."""
    layers = family.decoder_layers
    read = Read(visual, [[] for _ in layers])

    def hook(index: int, layer: nn.Module, args: tuple[Tensor, ...], arguments: InputDict) -> None:
        read.look(index, family, layer, args, arguments)

    handles = [
        layer.register_forward_pre_hook(partial(hook, index), with_kwargs=True) for index, layer in enumerate(layers)
    ]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def draw(rows: Sequence[Row], title: str) -> Figure:
    figure = new_figure(7, 4)
    axes = figure.subplots()
    layers = [row["layer"] for row in rows]
    axes.plot(layers, [row["attention"] for row in rows], marker="o", label="attention to visual tokens")
    axes.fill_between(layers, [row["low"] for row in rows], [row["high"] for row in rows], alpha=0.25)
    axes.plot(layers, [row["uniform"] for row in rows], color="0.5", linestyle="--", label="if it were uniform")
    axes.set(xlabel="layer of the LLM", ylabel="share of the answer's attention, %\n(95 % intervals)", title=title)
    axes.set_ylim(0, 100)
    figure.tick_whole_numbers(axes.xaxis)
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def findings(rows: Sequence[Row]) -> list[str]:
    most = max(rows, key=lambda row: row["attention"])
    least = min(rows, key=lambda row: row["attention"])
    half = len(rows) // 2
    first, second = (np.mean([row["attention"] for row in part]) for part in (rows[:half] or rows, rows[half:]))
    return [
        f"If it were uniform, {rows[0]['uniform']:.1f} % of the answer's attention would go to the"
        f" {rows[0]['visual_tokens']:.0f} visual tokens; they get from {least['attention']:.1f} % (layer"
        f" {least['layer']}) to {most['attention']:.1f} % (layer {most['layer']}).",
        f"Mean of the first half of the layers {first:.1f} %, of the second half {second:.1f} %.",
    ]
