"""What DFMR's threshold does: tokens and score over tau, in all and by complexity of the picture.

LLaVA-Zip (arXiv:2412.08771) leaves open how tau is to be chosen. Each tau is asked as it is, without calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmzip.evaluation.analyses.subject import Row, Subject, scored
from vlmzip.evaluation.results import Result
from vlmzip.methods import DFMR
from vlmzip.visualize.histogram import import_matplotlib

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: From where every picture keeps its tokens to where every one is pooled by the largest factor.
TAUS = (0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8)


def measure(subject: Subject) -> list[Row]:
    _, *found = subject.ask([DFMR(tau=tau) for tau in TAUS])
    return [{"tau": tau, **scored(result), **_by_count(result)} for tau, result in zip(TAUS, found, strict=True)]


def _by_count(result: Result) -> Row:
    """The mean number of tokens, and the questions whose picture kept so and so many of them."""
    counts = [record["visual_tokens_by_layer"][0] for record in result.records]
    shares = {count: 100 * counts.count(count) / len(counts) for count in sorted(set(counts), reverse=True)}
    return {
        "tokens": round(sum(counts) / len(counts), 2),
        "shares_by_tokens": " ".join(f"{count}:{share:.1f}%" for count, share in shares.items()),
    }


def draw(rows: Sequence[Row], title: str) -> Figure:
    import_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), dpi=150, layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    taus = [row["tau"] for row in rows]
    above.plot(taus, [row["score"] for row in rows], marker="o")
    above.fill_between(taus, [row["low"] for row in rows], [row["high"] for row in rows], alpha=0.2)
    above.set(ylabel="score, % (95 % intervals)", title=title)
    below.plot(taus, [row["reached"] for row in rows], marker="o", color="C1")
    below.set(xlabel="tau", ylabel="visual tokens kept, %")
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def findings(rows: Sequence[Row]) -> list[str]:
    first, last = rows[0], rows[-1]
    near = [row for row in rows if row["difference_high"] >= 0]
    least = min(near, key=lambda row: row["reached"]) if near else first
    return [
        f"From tau={first['tau']:g} to tau={last['tau']:g} the share of tokens kept goes from {first['reached']:.1f} %"
        f" to {last['reached']:.1f} %, the score from {first['score']:.1f} to {last['score']:.1f}.",
        f"The largest saving whose loss is within the 95 % interval is at tau={least['tau']:g}:"
        f" {least['reached']:.1f} % of the tokens, {least['difference']:+.1f} points.",
    ]
