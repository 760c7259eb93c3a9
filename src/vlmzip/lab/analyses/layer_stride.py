"""The effect of LLaVolta's layer and stride: score and tokens for each layer K and each stride S.

LLaVolta (arXiv:2406.20092) shows in its Figure 1 that visual tokens matter less in deeper layers. The figure has GQA
over K and S for LLaVA-1.5-7B, trained without compression, like the model here. K = -1 pools before the LLM, which is
the setting of the paper's baselines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmzip.lab.analyses.subject import Row, Subject, scored
from vlmzip.lab.configurations import PLAIN
from vlmzip.methods import LLaVolta
from vlmzip.methods.llavolta import BEFORE_THE_LLM
from vlmzip.models import family_of
from vlmzip.visualize.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Score by LLaVolta's layer and stride"
STRIDES = (2, 4, 8, 16)


def layers(depth: int) -> list[int]:
    """Return the layers to try: before the LLM, the paper's 1 and 2, and 1/4, 1/2 and 3/4 of `depth`."""
    inside = {1, 2, depth // 4, depth // 2, 3 * depth // 4}
    return [BEFORE_THE_LLM, *sorted(layer for layer in inside if 1 <= layer < depth)]


def measure(subject: Subject) -> list[Row]:
    depth = len(family_of(subject.model).decoder_layers)
    places = [(layer, stride) for layer in layers(depth) for stride in STRIDES]
    plain, *results = subject.ask([LLaVolta(layer=layer, stride=stride) for layer, stride in places])
    rows = [{"method": "llavolta", "layer": layer, "stride": stride} for layer, stride in places]
    return [
        {"method": PLAIN, "layer": "", "stride": "", **scored(plain)},
        *({**row, **scored(result)} for row, result in zip(rows, results, strict=True)),
    ]


def draw(rows: Sequence[Row], title: str) -> Figure:
    """Draw a heat map of the loss. Each cell has the score and the share of tokens."""
    plain, *tried = rows
    at = {(row["layer"], row["stride"]): row for row in tried}
    depths, strides = sorted({layer for layer, _ in at}), sorted({stride for _, stride in at})
    loss = [[at[layer, stride]["difference"] for stride in strides] for layer in depths]
    figure = new_figure(7, 5)
    axes = figure.subplots()
    worst = min(min(line) for line in loss)
    drawn = axes.imshow(loss, cmap="YlOrRd_r", vmin=min(worst, -1), vmax=0, aspect="auto")
    for (layer, stride), row in at.items():
        dark = row["difference"] < 0.6 * worst
        axes.text(
            strides.index(stride), depths.index(layer), f"{row['score']:.1f}\n{row['reached']:.0f} % of tokens",
            ha="center", va="center", fontsize="small", color="white" if dark else "black",
        )  # fmt: skip
    axes.set_xticks(range(len(strides)), [str(stride) for stride in strides])
    axes.set_yticks(range(len(depths)), [_name(layer) for layer in depths])
    axes.set(xlabel="stride S: tokens averaged into one", ylabel="layer K, the first with fewer tokens")
    axes.set_title(f"{title}\nscore in %; without compression {plain['score']:.1f}", fontsize="medium")
    figure.colorbar(drawn, label="difference from the uncompressed model, points")
    return figure


def _name(layer: int) -> str:
    return "before\nthe LLM" if layer == BEFORE_THE_LLM else str(layer)


def findings(rows: Sequence[Row]) -> list[str]:
    plain, *tried = rows
    middle = sorted({row["stride"] for row in tried})[1]
    along = sorted((row for row in tried if row["stride"] == middle), key=lambda row: row["layer"])
    steps = ", ".join(f"{_name(row['layer']).replace(chr(10), ' ')}: {row['score']:.1f}" for row in along)
    sentences = [f"Without compression {plain['score']:.1f}. At stride {middle}, by layer K: {steps}."]
    near = [row for row in tried if row["difference_high"] >= 0]
    if not near:
        return [
            *sentences,
            f"Every layer and stride that was tried loses for sure, with {plain['questions']} questions.",
        ]
    least = min(near, key=lambda row: row["reached"])
    return [
        *sentences,
        f"The fewest tokens at which {plain['questions']} questions cannot tell a loss from none: K={least['layer']},"
        f" S={least['stride']}, {least['reached']:.1f} % of the tokens, {least['difference']:+.1f} points; a loss of"
        f" {-least['difference_low']:.1f} is not ruled out.",
    ]
