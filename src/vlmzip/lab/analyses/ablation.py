"""The value of VisionZip's two kinds of tokens: dominant alone, contextual alone, and both, at equal counts.

VisionZip (arXiv:2412.04467) keeps the tokens that its encoder attends to (dominant) and merges the rest into a few more
(contextual). Both ways to merge are measured: the authors' code adds the mean of the merged tokens to the target
("reference"), and their paper takes the mean of all ("mean"). Without contextual tokens nothing is merged, so dominant
alone is measured once and compared with both.

Counts are fractions of the task's median grid. In encoders with CLS the dominant tokens include it. Dominant alone is
therefore CLS and one patch fewer, and contextual alone has no CLS: the LLM sees merged patches only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from vlmzip.keep import count_to_keep
from vlmzip.lab.analyses.subject import Row, Subject, Unsuited, interval, scored
from vlmzip.lab.results import Result, difference
from vlmzip.methods import VisionZip
from vlmzip.visualize.figure import new_figure

TITLE = "What VisionZip's dominant and contextual tokens are worth, each kind alone and both"
log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHARES = ("25%", "11%", "5.6%")
MERGES: tuple[Literal["reference", "mean"], ...] = ("reference", "mean")
BOTH, DOMINANT, CONTEXTUAL = "both", "dominant", "contextual"
COLOURS = {BOTH: "C0", DOMINANT: "C1", CONTEXTUAL: "C2"}
#: Horizontal factors of the points, so that intervals at equal counts do not overlap.
BESIDE = {BOTH: 1.0, DOMINANT: 0.97, CONTEXTUAL: 1.03}


def measure(subject: Subject) -> list[Row]:
    size = subject.profile().size
    shares = [share for share in SHARES if VisionZip(keep=share).split(size)[1]]
    if len(shares) < len(SHARES):
        less = ", ".join(share for share in SHARES if share not in shares)
        if not shares:
            raise Unsuited(f"ablation needs dominant and contextual tokens, and {less} of {size} are too few for both")
        log.info(f"ablation leaves out {less} of {size} tokens, too few for both dominant and contextual ones")
    variants = [
        (share, merge, part, _variant(size, share, merge, part))
        for share in shares
        for merge in MERGES
        for part in COLOURS
    ]
    methods = list(dict.fromkeys(method for *_, method in variants))
    plain, *compressed = subject.ask(methods)
    results = dict(zip(methods, compressed, strict=True))
    both = {(share, merge): results[method] for share, merge, part, method in variants if part == BOTH}
    first = {"budget": "100%", "merge": "", "part": "no_compression", "dominant": "", "contextual": ""}
    rows: list[Row] = [{**first, **scored(plain), "against_both": "", "against_both_low": "", "against_both_high": ""}]
    for share, merge, part, method in variants:
        names = {"budget": share, "merge": merge, "part": part}
        counts = {"dominant": method.dominant, "contextual": method.contextual}
        against = _against(results[method], both[share, merge], subject.seed)
        rows.append({**names, **counts, **scored(results[method]), **against})
    return rows


def _variant(size: int, share: str, merge: Literal["reference", "mean"], part: str) -> VisionZip:
    count = count_to_keep(share, size)
    if part == DOMINANT:  # nothing is merged, so this method is equal for both merges
        return VisionZip(dominant=count, contextual=0)
    if part == CONTEXTUAL:
        return VisionZip(dominant=0, contextual=count, merge=merge)
    dominant, contextual = VisionZip(keep=share).split(size)
    return VisionZip(dominant=dominant, contextual=contextual, merge=merge)


def _against(result: Result, both: Result, seed: int) -> Row:
    """Return the paired difference from both kinds together, in points."""
    return interval("against_both", difference(result.records, both.records, seed), 100)


def draw(rows: Sequence[Row], title: str) -> Figure:
    plain, *rest = rows
    figure = new_figure(9, 5)
    figure.suptitle(title)
    for axes, merge in zip(figure.subplots(1, len(MERGES), sharey=True), MERGES, strict=True):
        axes.axhline(plain["score"], color="black", linestyle="--", linewidth=1, label="no compression")
        for part in COLOURS:
            _line(axes, [row for row in rest if (row["merge"], row["part"]) == (merge, part)], part)
        places = sorted({row["reached"] for row in rest})
        axes.set(xlabel="visual tokens kept, %", xscale="log")
        axes.set_title(f"merge: {merge}", fontsize="medium")
        axes.set_xticks(places, [f"{place:.3g}" for place in places])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set(ylabel="score, % (95 % intervals)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _line(axes: Axes, mine: Sequence[Row], part: str) -> None:
    """Draw the scores of one part over its tokens."""
    places, scores = [BESIDE[part] * row["reached"] for row in mine], [row["score"] for row in mine]
    below, above = (  # differences of rounded numbers can be slightly below 0
        [max(0.0, sign * (row[end] - row["score"])) for row in mine] for end, sign in (("low", -1), ("high", 1))
    )
    label = part if part == BOTH else f"{part} alone"
    axes.errorbar(
        places, scores, yerr=[below, above], color=COLOURS[part], marker="o", capsize=2, linewidth=1.2, label=label
    )


def findings(rows: Sequence[Row]) -> list[str]:
    plain, *rest = rows
    sentences = [f"Without compression the score is {plain['score']:.1f} ({plain['questions']} questions)."]
    for share in dict.fromkeys(row["budget"] for row in rest):
        for merge in MERGES:
            both, dominant, contextual = (
                next(row for row in rest if (row["budget"], row["merge"], row["part"]) == (share, merge, part))
                for part in COLOURS
            )
            sentences.append(
                f"{share}, merge {merge}: both ({both['dominant']} + {both['contextual']}) {both['score']:.1f};"
                f" dominant alone {_beside(dominant)}; contextual alone {_beside(contextual)}."
            )
    return sentences


def _beside(row: Row) -> str:
    """Return a score, its difference from both kinds together, and whether the difference is significant."""
    low, high = row["against_both_low"], row["against_both_high"]
    sure = "" if low > 0 or high < 0 else ", no significant difference from both"
    return f"{row['score']:.1f} ({row['against_both']:+.1f} points, {low:+.1f} to {high:+.1f}{sure})"
