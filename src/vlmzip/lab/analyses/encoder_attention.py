"""How concentrated the vision encoder's attention is, layer by layer, and why VisionZip reads the layer that it reads.

VisionZip (arXiv:2412.04467) keeps the tokens that CLS attends to in the layer whose features the LLM gets (the
penultimate one in LLaVA). In encoders without CLS it keeps the tokens that receive most attention from all tokens
(appendix A.2). This analysis reads the same scores in every layer, in one run of the encoder, as attention rows; it
never computes a matrix of tokens by tokens.

The scores of an image's tokens are divided by their sum. CLS's attention to itself is left out, as in VisionZip. If
attention is spread evenly, the most attended tenth of tokens gets 10 %. The effective number of tokens is the
exponential of the entropy. In layers with windowed attention (most of Qwen2.5-VL's), each window's total is its number
of tokens, so the scores only show differences inside windows. Compare these layers with each other, not with layers
that attend to whole images.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vlmzip.errors import UserError
from vlmzip.files import write_whole
from vlmzip.keep import AS_SET, count_to_keep
from vlmzip.lab.analyses.subject import Row, Subject, Unsuited, interval
from vlmzip.lab.stats import Bootstrap, estimate
from vlmzip.lab.tasks.task import Sample
from vlmzip.models import family_of
from vlmzip.models.encoder_run import EncoderAttention
from vlmzip.progress import working
from vlmzip.runtime.answering import Answerer
from vlmzip.runtime.compress import view_numbers
from vlmzip.visualize.attention import Map, draw_maps
from vlmzip.visualize.figure import new_figure
from vlmzip.visualize.overlay import seen_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "How concentrated the vision encoder's attention is"
#: Percentages of the most attended tokens whose share of the attention is reported.
TOPS = (5, 10, 20)
#: Number of images to encode at a time; the queries and keys of all layers are in memory at once.
TOGETHER = 8
#: Number of layers to show as maps: the first, the last and some between them.
SHOWN = 6


def measure(subject: Subject) -> list[Row]:
    """Measure the concentration, and draw the attention of one image's layers to `encoder_attention-maps.png`.

    The first process does all the work. Raise `UserError` if the folder has answers of another model, so that figures
    of two models do not get mixed.
    """
    subject.study().configure([subject.task], [], [AS_SET])
    if not subject.processes.first:
        return []
    answerer = Answerer(family_of(subject.model), subject.processor)
    samples = list({sample.image: sample for sample in subject.task.samples}.values())
    values, last = [], None
    with working("encoding images", len(samples)) as work:
        for number, (attention, images, views_of) in enumerate(_encoded(answerer, samples)):
            by_view = [concentration(scores) for scores in attention.by_view]
            values += [np.mean([by_view[view] for view in views], axis=0) for views in views_of]
            if number == 0:
                _draw_image(subject, answerer, images, attention)
            last = attention
            work.advance(len(images))
    assert last is not None  # a task has questions
    return _rows(last, np.stack(values), [sample.image for sample in samples], subject.seed)


def _encoded(
    answerer: Answerer, samples: Sequence[Sample]
) -> Iterator[tuple[EncoderAttention, Sequence[Image.Image], list[range]]]:
    """Yield the attention of `TOGETHER` images at a time, these images, and the numbers of the views of each."""
    for start in range(0, len(samples), TOGETHER):
        images = [sample.load() for sample in samples[start : start + TOGETHER]]
        inputs = answerer.inputs(images, [""] * len(images))
        yield _read(answerer, inputs), images, view_numbers(answerer.family.layouts(inputs))


def _read(answerer: Answerer, inputs: Mapping[str, object]) -> EncoderAttention:
    try:
        with torch.inference_mode():
            return answerer.family.encoder_attention(inputs)
    except UserError as error:  # the family's encoder does not support this
        raise Unsuited(str(error)) from error


def concentration(scores: Float[Tensor, "layers tokens"]) -> np.ndarray:
    """Return five numbers per layer, shape [layers, 5].

    They are the shares of attention that the top 5, 10 and 20 % of tokens get, the entropy as a fraction of its
    maximum, and the effective number of tokens.
    """
    share = scores.double() / scores.double().sum(1, keepdim=True)
    size = share.shape[1]
    falling = share.sort(dim=1, descending=True).values.cumsum(1)
    tops = [falling[:, count_to_keep(f"{top}%", size) - 1] for top in TOPS]
    entropy = -torch.special.xlogy(share, share).sum(1)
    most = np.log(size) if size > 1 else 1.0
    return torch.stack([*tops, entropy / most, entropy.exp()], dim=1).cpu().numpy()


def _rows(attention: EncoderAttention, values: np.ndarray, images: Sequence[str], seed: int) -> list[Row]:
    """Return a row for each layer. `values` has the numbers of `concentration`, shape [images, layers, 5]."""
    bootstrap, ones = Bootstrap(images, seed), np.ones(len(values))
    scales = {**{f"top_{top}": 100.0 for top in TOPS}, "entropy": 100.0, "effective_tokens": 1.0}
    rows = []
    for layer, whose in enumerate(attention.whose):
        row: Row = {"layer": layer, "attends": whose, "read_by_visionzip": "yes" if layer == attention.scored else ""}
        row["images"] = len(values)
        for column, (name, scale) in enumerate(scales.items()):
            row |= interval(name, estimate(bootstrap.share(scale * values[:, layer, column], ones)))
        beyond = values[:, layer, TOPS.index(10)] - values[:, attention.scored, TOPS.index(10)]
        row |= interval("top_10_beyond_read", estimate(bootstrap.share(100 * beyond, ones)))
        rows.append(row)
    return rows


def _draw_image(
    subject: Subject, answerer: Answerer, images: Sequence[Image.Image], attention: EncoderAttention
) -> None:
    """Draw the first image and the attention of some layers to it."""
    inputs = answerer.inputs(images[:1], [""])
    (grid, *_), pixels = answerer.family.grids(inputs), answerer.family.view_pixels(inputs)
    processor, seen = subject.processor.image_processor, images[0]
    if pixels is not None:  # draw the cropped and scaled image that the encoder sees; else the grid covers it all
        seen = seen_image(pixels[0], processor.image_mean, processor.image_std)
    depth = len(attention.whose)
    layers = {*np.linspace(0, depth - 1, min(SHOWN, depth)).round().astype(int).tolist(), attention.scored}
    maps = [
        Map(f"layer {layer}" + ", VisionZip's" * (layer == attention.scored), attention.by_view[0][layer].tolist())
        for layer in sorted(layers)
    ]
    page = draw_maps(seen, grid, maps)
    write_whole(subject.folder / "encoder_attention-maps.png", lambda name: page.save(name))


def draw(rows: Sequence[Row], title: str) -> Figure:
    figure = new_figure(7, 7)
    above, below = figure.subplots(2, sharex=True)
    layers = [row["layer"] for row in rows]
    for number, top in enumerate(TOPS):
        _line(above, rows, f"top_{top}", f"C{number}", f"most attended {top} % of tokens")
    for number, top in enumerate(TOPS):
        label = "their shares if evenly spread" if number == 0 else "_"  # "_" gives no entry in the legend
        above.axhline(top, color=f"C{number}", linestyle=":", linewidth=1, label=label)
    _line(below, rows, "effective_tokens", "C3", "")
    above.set(ylabel="share of the attention, %", title=title, ylim=(0, None))
    below.set(xlabel="layer of the vision encoder, from 0", ylabel="effective number of tokens", ylim=(0, None))
    figure.tick_whole_numbers(below.xaxis)
    for axes in (above, below):
        _mark_layers(axes, rows)
        axes.set_xlim(layers[0] - 0.5, layers[-1] + 0.5)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


def _line(axes: Axes, rows: Sequence[Row], name: str, colour: str, label: str) -> None:
    """Draw a line with its 95 % interval."""
    layers = [row["layer"] for row in rows]
    axes.plot(layers, [row[name] for row in rows], color=colour, marker="o", markersize=4, label=label)
    low, high = ([row[f"{name}_{end}"] for row in rows] for end in ("low", "high"))
    axes.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)


def _mark_layers(axes: Axes, rows: Sequence[Row]) -> None:
    """Mark the layer that VisionZip reads and the layers with windowed attention."""
    read = next(row["layer"] for row in rows if row["read_by_visionzip"])
    axes.axvline(read, color="0.5", linestyle="--", linewidth=1, label="read by VisionZip")
    windowed = [row["layer"] for row in rows if "window" in row["attends"]]
    for layer in windowed:
        label = "inside of windows" if layer == windowed[0] else "_"
        axes.axvspan(layer - 0.5, layer + 0.5, color="0.92", zorder=0, label=label)


def findings(rows: Sequence[Row]) -> list[str]:
    read = next(row for row in rows if row["read_by_visionzip"])
    like = [row for row in rows if row["attends"] == read["attends"]]
    most, least = (choose(like, key=lambda row: row["top_10"]) for choose in (max, min))
    fewest = min(like, key=lambda row: row["effective_tokens"])
    more = [str(row["layer"]) for row in like if row["top_10_beyond_read_low"] > 0]
    sentences = [
        f"In layer {read['layer']} of {len(rows)} (from 0), which VisionZip reads, the most attended tenth of tokens"
        f" gets {_percent(read, 'top_10')} of the attention of {read['attends']}, and the effective number of tokens is"
        f" {read['effective_tokens']:.0f} ({read['images']} images).",
        f"The most concentrated layer is {most['layer']} ({_percent(most, 'top_10')}), the least is {least['layer']}"
        f" ({_percent(least, 'top_10')}); by the effective number of tokens the most concentrated one is"
        f" {fewest['layer']} ({fewest['effective_tokens']:.0f}).",
        f"More concentrated than the layer that is read, by their tenths and beyond the 95 % interval:"
        f" {', '.join(more) or 'none'}.",
    ]
    if read is not rows[-1]:
        last = rows[-1]
        sentences.append(
            f"The last layer's tenth gets {last['top_10_beyond_read']:+.1f} points"
            f" ({last['top_10_beyond_read_low']:+.1f} to {last['top_10_beyond_read_high']:+.1f}) against it."
        )
    if len(like) < len(rows):
        sentences.append(f"{len(rows) - len(like)} layers attend inside of windows and are not compared with it.")
    return sentences


def _percent(row: Row, name: str) -> str:
    return f"{row[name]:.1f} % ({row[f'{name}_low']:.1f} to {row[f'{name}_high']:.1f})"
