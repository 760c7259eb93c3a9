"""The results of `vlmzip tune`: sentences, a table, JSON, CSV, a curve, and the compressor itself.

`search` explains the choosing half and the confirming half of the images.
"""

from __future__ import annotations

import logging
import math
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.compressor_file import write_compressor
from vlmzip.errors import UserError
from vlmzip.files import write_csv
from vlmzip.lab.configurations import Configuration
from vlmzip.lab.curves import save_figure
from vlmzip.lab.stats import Estimate
from vlmzip.lab.table import ABSENT, NOTHING, Column, Table, print_json
from vlmzip.lab.tune.curve import draw
from vlmzip.lab.tune.search import LEAST_IMAGES, PLAIN, CandidateRow, Rejection, Tuning, Verdict
from vlmzip.lab.tune.study import Cost, TunedStudy
from vlmzip.outline import FILE
from vlmzip.visualize.figure import import_matplotlib

log = logging.getLogger(__name__)

#: The heading and format of each cost.
COST_TEXTS = {"tokens": ("tokens", "{:.1f}"), "flops": ("FLOPs", "{:.1%}"), "ms": ("ms", "{:.1f}")}
#: The heading of the column with the fate of a candidate; blank in print.
FATE = " "
UNITS: dict[Cost, str] = {"tokens": "visual tokens", "flops": "of the prefill FLOPs", "ms": "ms prefill"}

FATES = {
    "cost": "costs too much",
    "loss": "loses too much",
    "behind": "clearly behind",
    "broke": "broke",
    "unconfirmed": "not confirmed",
}


@dataclass(frozen=True)
class SearchOutcome:
    """A completed search."""

    asked: TunedStudy
    tuning: Tuning
    verdict: Verdict
    impossible: Sequence[Configuration]
    """Methods at budgets that they cannot reach."""

    @property
    def chosen(self) -> CandidateRow | None:
        return None if self.verdict.kind == "nothing" else self.verdict.row

    @property
    def rows(self) -> list[CandidateRow]:
        """Return the candidates: most questions first, then least loss; candidates that cost too much come last."""

        def place(row: CandidateRow) -> tuple[bool, int, float]:
            return row.out == Rejection("cost"), -row.asked, row.lost if row.asked else row.cost

        return sorted(self.tuning.rows.values(), key=place)

    def too_dear(self, row: CandidateRow) -> bool:
        """Return whether a candidate was not asked because of its cost."""
        return row.out == Rejection("cost") and not row.asked

    @property
    def broken(self) -> dict[str, str]:
        """Return the candidates that broke while they were asked or timed, with the reasons."""
        return dict(map(self.broke, sorted(self.asked.failures)))

    def broke(self, number: int) -> tuple[str, str]:
        return self._name(number), self.asked.failures[number]

    @property
    def grid(self) -> int:
        """Return how many answers all questions take, for the uncompressed model and each candidate that was asked."""
        return len(self.asked.task.samples) * (1 + sum(row.asked > 0 for row in self.rows))

    def name(self, row: CandidateRow) -> str:
        """Return a candidate in one line, as `--method` takes it."""
        return self._name(row.number)

    def method(self, row: CandidateRow) -> str:
        return self.asked.configurations[row.number].method

    def compressor(self, row: CandidateRow) -> Compressor:
        return self.asked.configurations[row.number].chosen

    def _name(self, number: int) -> str:
        return spec.write(self.asked.configurations[number].chosen)

    def fate(self, row: CandidateRow) -> str:
        """Return what became of a candidate."""
        if row is self.chosen:
            return "chosen"
        if row.out is None:
            return "dearer than what meets it" if row in self.tuning.waiting() else "kept to the end, not chosen"
        return FATES[row.out.why]

    def detail(self, row: CandidateRow) -> str:
        """Return the candidate that a dropped one was clearly worse than, or the error of one that broke."""
        if row.out is None or row.out.why not in ("behind", "broke"):
            return ""
        behind = row.out.why == "behind"
        return self.name(self.tuning.rows[row.out.than]) if behind else self.asked.failures.get(row.number, "")

    def costs(self, row: CandidateRow) -> dict[str, float]:
        """Return the known costs of a candidate."""
        return self.asked.means(row.number) if row.asked else {self.asked.cost: row.cost} if row.cost else {}


def show(found: SearchOutcome, args: Namespace) -> None:
    """Write all results and print them. Print them even if the disk is full."""
    folder = found.asked.study.folder
    try:
        write_csv(folder / "tune.csv", _csv(found))
        _draw(found, folder)
        if found.chosen:
            write_compressor(found.compressor(found.chosen), folder)
    finally:
        print_json(as_json(found, args)) if args.json else _print(found, folder, args)


def _draw(found: SearchOutcome, folder: Path) -> None:
    try:
        import_matplotlib()
    except UserError as error:
        log.warning(f"there is no curve: {error}")
        return
    names = {number: found.method(row) for number, row in found.tuning.rows.items()}
    title = f"{found.asked.study.name} on {found.asked.task.name}, {len(found.asked.task.samples):,} questions"
    save_figure(draw(found.tuning, found.chosen, names, found.asked.cost, title), folder / "curve.png")


# ---------------------------------------------------------------- in words


def sentences(found: SearchOutcome) -> list[str]:
    """Return the verdict in sentences."""
    row, target = found.verdict.row, found.tuning.target
    if found.verdict.kind == "nothing":
        return [_nothing(found)]
    assert row is not None
    assert row.held is not None
    held, confirming = row.held, len(found.tuning.images["confirm"])
    where = f"on {confirming:,} questions that chose nothing ({100 * held.score:.1f} % for {100 * held.plain:.1f} %)"
    verdict_lines = [f"{found.name(row)}: {_cost(held.cost, found.asked.cost)}, loses {_interval(row)} points {where}"]
    if found.verdict.kind == "certified":
        verdict_lines.append(
            f"The loss is within {_points(target.loss)}: with all tries considered at most {100 * held.bound:.1f}."
        )
    elif found.verdict.kind == "likely":
        verdict_lines.append(_unsure(found, row))
    if held.attempt > 1 or (found.verdict.kind == "certified" and len(found.tuning.tries) > 1):
        verdict_lines.append(f"{len(found.tuning.tries)} candidates were tried there, the cheapest first.")
    return verdict_lines


def _unsure(found: SearchOutcome, row: CandidateRow) -> str:
    assert row.held is not None
    count, images = len(found.tuning.images["confirm"]), len(set(found.tuning.images["confirm"]))
    within = f"The estimate is within {_points(found.tuning.target.loss)}, but"
    if math.isinf(row.held.bound):
        return f"{within} {images} images cannot tell: at least {LEAST_IMAGES} have to confirm."
    return (
        f"{within} {count:,} questions cannot tell: the loss may reach {100 * row.held.bound:.1f}. Ask more questions."
    )


def _nothing(found: SearchOutcome) -> str:
    row, target = found.verdict.row, found.tuning.target
    if row is None:
        return "Nothing meets it: no candidate can run; tune.csv says why."
    if row.out and row.out.why == "cost":
        most, what = _cost(target.most, found.asked.cost), "Nothing that runs" if found.broken else "Nothing"
        return f"{what} costs at most {most}; the cheapest is {found.name(row)}, {_cost(row.cost, found.asked.cost)}."
    within = f" at {_cost(target.most, found.asked.cost)}" if target.most is not None else ""
    return _lossy(found, row, f"{_points(target.loss)}{within}")


def _lossy(found: SearchOutcome, row: CandidateRow, wished: str) -> str:
    """Return that no candidate is known to lose so little, and the nearest candidate.

    Also say whether the intervals rule the target out or only the estimates miss it.
    """
    loss, doubtful = found.tuning.target.loss, found.tuning.in_doubt()
    assert loss is not None
    half, cost = ("confirms", row.held.cost) if row.held else ("chooses", row.cost)
    loses = f"loses {_interval(row)} points on the half that {half}"
    nearest = f"the nearest, {found.name(row)}, {_cost(cost, found.asked.cost)}, {loses}"
    if row.lost <= loss:
        return f"No loss within {wished} is confirmed; {nearest}, which alone is not enough: ask more questions."
    if not doubtful:
        return f"Nothing is within {wished}: {nearest}, so {100 * loss:g} is ruled out."
    estimates = f"No estimate within {wished} is confirmed" if found.tuning.tries else f"No estimate is within {wished}"
    whom = "" if row in doubtful else f" for {found.name(doubtful[0])}"
    return f"{estimates}; {nearest}, so {100 * loss:g} is not ruled out{whom}: ask more questions."


def _print(found: SearchOutcome, folder: Path, args: Namespace) -> None:
    task = found.asked.task
    print(f"{task.name}: {task.about}; {task.metric.about}; {len(task.samples):,} questions\n")
    if asked := [row for row in found.rows if not found.too_dear(row)]:
        table(found, asked).print()
    for name, why in found.broken.items():
        print(f"\n{name} {why}")
    if lines := _left_out(found):
        print("\n" + "\n".join(lines))
    print("\n" + "\n".join(sentences(found)))
    print(f"{found.tuning.answers:,} of the {found.grid:,} answers that the whole grid would take")
    if found.chosen:
        print(f"use it: vlmzip ask IMAGE QUESTION --model {args.model} --method {folder / FILE}")
    print(f"written to {folder}")


def _left_out(found: SearchOutcome) -> list[str]:
    """Return a line for each reason why candidates are missing from the table."""
    dear = [row for row in found.rows if found.too_dear(row)]  # the cheapest first
    lines = []
    if dear:
        methods = _by_method([found.method(row) for row in dear])
        cheapest = f"{found.name(dear[0])}, {_cost(dear[0].cost, found.asked.cost)}"
        were = "candidate was" if len(dear) == 1 else "candidates were"
        lines.append(f"{len(dear):,} {were} not asked, being too costly ({methods}); the cheapest: {cheapest}")
    if found.impossible:
        methods = _by_method([one.method for one in found.impossible])
        pairs = "combination" if len(found.impossible) == 1 else "combinations"
        lines.append(
            f"{len(found.impossible):,} {pairs} of method and budget cannot run ({methods}); tune.csv says why"
        )
    return lines


def _by_method(methods: Sequence[str]) -> str:
    """Return how often each method occurs: `3 of visionzip, 1 of dfmr`."""
    return ", ".join(f"{count:,} of {method}" for method, count in Counter(methods).items())


def _cost(value: float | None, cost: Cost) -> str:
    assert value is not None
    amount = f"{value:.1%}" if cost == "flops" else f"{value:.1f}".removesuffix(".0")
    return f"{amount} {UNITS[cost]}"


def _points(loss: float | None) -> str:
    assert loss is not None
    return f"{100 * loss:g} points"


def _interval(row: CandidateRow) -> str:
    """Return the loss on the confirming half, or on the choosing half for a candidate that was not confirmed."""
    return _estimate(row.held.loss if row.held else row.loss)


def _estimate(loss: Estimate | None) -> str:
    return f"{100 * loss.value:.1f} [{100 * loss.low:.1f}, {100 * loss.high:.1f}]" if loss else NOTHING


# ---------------------------------------------------------------- as data


def as_json(found: SearchOutcome, args: Namespace) -> dict[str, object]:
    """Return the results for JSON. Scores, losses and shares are from 0 to 1; an unknown bound is null."""
    folder, target = found.asked.study.folder, found.tuning.target
    return {
        "model": args.model,
        "task": found.asked.task.name,
        "out": str(folder),
        "cost": found.asked.cost,
        "most": target.most,
        "loss": target.loss,
        "verdict": found.verdict.kind,
        "said": sentences(found),
        "chosen": table(found, [found.chosen]).as_json()[0] if found.chosen else None,
        "compressor": str(folder / FILE) if found.chosen else None,
        "tries": len(found.tuning.tries),
        "answers": found.tuning.answers,
        "grid": found.grid,
        "questions": {part: len(images) for part, images in found.tuning.images.items()},
        "candidates": table(found, found.rows).as_json(),
        "broken": found.broken,
        "impossible": [{"method": one.method, "budget": one.budget, "note": one.note} for one in found.impossible],
    }


def table(found: SearchOutcome, rows: Sequence[CandidateRow]) -> Table[CandidateRow]:
    """Return candidates as rows. CSV has scores in percent, JSON from 0 to 1."""
    configurations, costs = found.asked.configurations, ["tokens", "flops", *["ms"] * (found.asked.cost == "ms")]
    columns: list[Column[CandidateRow]] = [
        Column(lambda row: configurations[row.number].method, key="method", csv=("method",)),
        Column(lambda row: configurations[row.number].budget, key="budget", csv=("budget",)),
        Column(found.name, "candidate", key="compressor", csv=("compressor",)),
        *(_cost_column(found, name) for name in COST_TEXTS),
        Column(lambda row: row.asked, "asked", "{:,}".format, "asked", ("asked",)),
        Column(lambda row: row.round, key="rounds", csv=("rounds",)),
        Column(
            lambda row: row.score if row.asked else ABSENT, "score %", lambda score: f"{100 * score:.1f}",
            "score", ("score",), _percent,
        ),
        Column(
            lambda row: row.loss or ABSENT, "loss", _estimate,
            "lost", ("loss", "loss_low", "loss_high"), _percents,
        ),
        Column(_confirmed, key="confirmed"),
        Column(
            lambda row: row.held or ABSENT,
            csv=("confirmed_loss", "confirmed_low", "confirmed_high", "confirmed_bound"),
            cells=lambda held: (*_percents(held.loss), _percent(held.bound)),
        ),
        Column(found.fate, FATE, key="fate", csv=("fate",)),
        Column(lambda row: found.detail(row) or None, key="detail", csv=("detail",)),
        *(_condition_column(found, name) for name in found.asked.study.conditions),
    ]  # fmt: skip
    return Table(
        columns, rows, ["candidate", *(COST_TEXTS[name][0] for name in costs), "asked", "score %", "loss", FATE]
    )


def _cost_column(found: SearchOutcome, name: str) -> Column[CandidateRow]:
    heading, text = COST_TEXTS[name]
    return Column(lambda row: found.costs(row).get(name, ABSENT), heading, text.format, name, (name,), "{:.4f}".format)


def _condition_column(found: SearchOutcome, name: str) -> Column[CandidateRow]:
    return Column(lambda row: found.asked.study.conditions[name] if row is found.chosen else ABSENT, csv=(name,))


def _confirmed(row: CandidateRow) -> object:
    """Return the result on the confirming half for JSON; an unknown bound is null."""
    if row.held is None:
        return ABSENT
    bound = None if math.isinf(row.held.bound) else row.held.bound
    return row.held._asdict() | {"loss": vars(row.held.loss), "bound": bound}


def _csv(found: SearchOutcome) -> list[dict[str, object]]:
    """Return the rows of the CSV.

    They are the uncompressed model, the candidates, methods that broke, and combinations that cannot run, with the
    reasons.
    """
    rows = [_plain_line(found), *table(found, found.rows).as_csv()]
    rows += [_broken_line(found, number) for number in found.asked.failures if number not in found.tuning.rows]
    rows += [{"method": one.method, "budget": one.budget, "detail": one.note} for one in found.impossible]
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, "") for name in columns} for row in rows]


def _plain_line(found: SearchOutcome) -> dict[str, object]:
    one, plain = found.asked.configurations[PLAIN], found.tuning.plain
    line: dict[str, object] = {"method": one.method, "budget": one.budget, "compressor": one.method}
    if not plain.asked:
        return line
    costs = {name: f"{value:.4f}" for name, value in found.asked.means(PLAIN).items()}
    return line | costs | {"asked": plain.asked, "score": _percent(plain.score)}


def _broken_line(found: SearchOutcome, number: int) -> dict[str, object]:
    """Return the row of a method that broke when it was timed and so never became a candidate."""
    one, (name, why) = found.asked.configurations[number], found.broke(number)
    return {"method": one.method, "budget": one.budget, "compressor": name, "fate": FATES["broke"], "detail": why}


def _percents(estimate: Estimate) -> tuple[str, ...]:
    return tuple(map(_percent, (estimate.value, estimate.low, estimate.high)))


def _percent(share: float) -> str:
    return "" if math.isinf(share) else f"{100 * share:.2f}"
