"""The effect of DFMR's threshold: tokens and score over tau, for all images and by image complexity.

LLaVA-Zip (arXiv:2412.08771) promises fewer tokens for plain images and more for detailed ones, and leaves open how to
choose tau. Here each tau is used as it is, without calibration.

A task can state the complexity of its images. Each group that all questions about an image share (mini's levels: flat,
patterned, cluttered) has separate columns and lines. Tasks without such groups only have the columns of all questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmzip.lab.analyses.subject import Row, Subject, interval, scored
from vlmzip.lab.records import Record
from vlmzip.lab.results import difference
from vlmzip.methods import DFMR
from vlmzip.visualize.figure import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLE = "Score and visual tokens by DFMR's threshold tau"
#: From a threshold at which no image is pooled to one at which every image is pooled by the largest factor.
TAUS = (0.0, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8)
#: A group with more values than this does not state complexity, and would overload the figure.
MOST_VALUES = 6


def measure(subject: Subject) -> list[Row]:
    plain, *results = subject.ask([DFMR(tau=tau) for tau in TAUS])
    rows = []
    for tau, result in zip(TAUS, results, strict=True):
        row = {"tau": tau, **scored(result), **_tokens(result.records)}
        for group in image_groups(plain.records):
            row |= _of_group(group, result.records, plain.records, subject.seed)
        rows.append(row)
    return rows


def image_groups(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return the groups of images, such as ("level", "flat"), sorted by name and then by first occurrence.

    Groups that differ between questions about the same image, such as question types, are left out.
    """
    groups = []
    for name in sorted({name for record in records for name in record["groups"]}):
        pairs = {(record["image"], record["groups"].get(name)) for record in records}
        values = list(dict.fromkeys(record["groups"].get(name) for record in records))
        if len(pairs) == len({image for image, _ in pairs}) and None not in values and len(values) <= MOST_VALUES:
            groups += [(name, value) for value in values]
    return groups


def _tokens(records: Sequence[Record]) -> Row:
    """Return the mean number of tokens, and the share of questions for each number of tokens."""
    counts = [record["visual_tokens_by_layer"][0] for record in records]
    shares = {count: 100 * counts.count(count) / len(counts) for count in sorted(set(counts), reverse=True)}
    return {
        "tokens": round(sum(counts) / len(counts), 2),
        "shares_by_tokens": " ".join(f"{count}:{share:.1f}%" for count, share in shares.items()),
    }


def _of_group(group: tuple[str, str], records: Sequence[Record], plain: Sequence[Record], seed: int) -> Row:
    """Return a group's questions, score in percent, paired difference from no compression, and mean token count."""
    name, value = group
    mine, before = ([r for r in part if r["groups"][name] == value] for part in (records, plain))
    against = difference(mine, before, seed)
    return {
        f"questions_{name}_{value}": len(mine),
        f"score_{name}_{value}": round(100 * sum(record["score"] for record in mine) / len(mine), 2),
        **interval(f"difference_{name}_{value}", against, 100),
        f"tokens_{name}_{value}": _tokens(mine)["tokens"],
    }


def draw(rows: Sequence[Row], title: str) -> Figure:
    figure = new_figure(7, 6)
    above, below = figure.subplots(2, sharex=True)
    taus = [row["tau"] for row in rows]
    above.plot(taus, [row["score"] for row in rows], marker="o", color="black", label="all images")
    above.fill_between(taus, [row["low"] for row in rows], [row["high"] for row in rows], color="black", alpha=0.12)
    below.plot(taus, [row["tokens"] for row in rows], marker="o", color="black")
    for number, group in enumerate(_groups(rows)):
        _thin_lines(above, below, rows, group, f"C{number}")
    above.set(ylabel="score, % (95 % intervals)", title=title)
    below.set(xlabel="tau", ylabel="visual tokens an image", ylim=(0, None))
    for axes in (above, below):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if _groups(rows):
        figure.legend(*above.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _groups(rows: Sequence[Row]) -> list[str]:
    """Return the groups that have columns, such as "level_flat"."""
    return [name.removeprefix("score_") for name in rows[0] if name.startswith("score_")]


def _thin_lines(above: Axes, below: Axes, rows: Sequence[Row], group: str, colour: str) -> None:
    for axes, name in ((above, "score"), (below, "tokens")):
        values = [row[f"{name}_{group}"] for row in rows]
        axes.plot([row["tau"] for row in rows], values, color=colour, linewidth=1, label=group.replace("_", ": ", 1))


def findings(rows: Sequence[Row]) -> list[str]:
    first, last = rows[0], rows[-1]
    sentences = [
        f"From tau={first['tau']:g} to tau={last['tau']:g} the share of tokens kept goes from {first['reached']:.1f} %"
        f" to {last['reached']:.1f} %, the score from {first['score']:.1f} to {last['score']:.1f}.",
        _largest_saving(rows),
    ]
    half = min(rows, key=lambda row: abs(row["reached"] - 50))
    sentences += [
        f"At tau={half['tau']:g}, with {half['reached']:.1f} % kept, {_group(half, name)}." for name in _groups(rows)
    ]
    return sentences


def _largest_saving(rows: Sequence[Row]) -> str:
    """Return a sentence about the largest saving without a significant loss.

    The search ends at the first tau with a significant loss, so that a lucky result at a larger tau does not count.
    """
    saving = [row for row in rows if row["reached"] < 100]
    if not saving:
        return "No tau that was tried saves tokens."
    first = saving[0]
    if first["difference_high"] < 0:
        return (
            f"With {first['questions']} questions, the smallest saving that was tried already costs a loss beyond the"
            f" 95 % interval: tau={first['tau']:g} keeps {first['reached']:.1f} % of the tokens,"
            f" {_points(first, 'difference')}."
        )
    lost = next((place for place, row in enumerate(saving) if row["difference_high"] < 0), len(saving))
    least = min(saving[:lost], key=lambda row: row["reached"])
    return (
        f"The largest saving without a significant loss with {least['questions']} questions is at"
        f" tau={least['tau']:g}: {least['reached']:.1f} % of the tokens, {_points(least, 'difference')}, so that a loss"
        f" of up to {max(0.0, -least['difference_low']):.1f} points is not ruled out."
    )


def _group(row: Row, group: str) -> str:
    return (
        f"{group.replace('_', ' ')} has {row[f'tokens_{group}']:.1f} tokens an image and"
        f" {_points(row, f'difference_{group}')} of {row[f'questions_{group}']} questions"
    )


def _points(row: Row, name: str) -> str:
    return f"{row[name]:+.1f} points ({row[f'{name}_low']:+.1f} to {row[f'{name}_high']:+.1f})"
