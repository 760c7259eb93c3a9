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
from vlmzip.lab.curves import plot_title, save_figure
from vlmzip.lab.stats import Estimate
from vlmzip.lab.table import ABSENT, NOTHING, Column, Table, print_json
from vlmzip.lab.tune.curve import TITLES, draw
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

    def too_costly(self, row: CandidateRow) -> bool:
        """Return whether a candidate was skipped, without asking a question, because it costs too much."""
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
            return (
                "costs more than one that meets it" if row in self.tuning.waiting() else "kept to the end, not chosen"
            )
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


def show(outcome: SearchOutcome, args: Namespace) -> None:
    """Write all results and print them. Print them even if the disk is full."""
    folder = outcome.asked.study.folder
    try:
        write_csv(folder / "tune.csv", _csv(outcome))
        _draw(outcome, folder)
        if outcome.chosen:
            write_compressor(outcome.compressor(outcome.chosen), folder)
    finally:
        print_json(as_json(outcome, args)) if args.json else _print(outcome, folder, args)


def _draw(outcome: SearchOutcome, folder: Path) -> None:
    try:
        import_matplotlib()
    except UserError as error:
        log.warning(f"no curve is drawn: {error}")
        return
    names = {number: outcome.method(row) for number, row in outcome.tuning.rows.items()}
    asked = outcome.asked
    title = plot_title(TITLES[asked.cost], asked.study.name, asked.task)
    save_figure(draw(outcome.tuning, outcome.chosen, names, asked.cost, title), folder / "curve.png")


# ---------------------------------------------------------------- in words


def sentences(outcome: SearchOutcome) -> list[str]:
    """Return the verdict in sentences."""
    row, target = outcome.verdict.row, outcome.tuning.target
    if outcome.verdict.kind == "nothing":
        return [_nothing(outcome)]
    assert row is not None
    assert row.held is not None
    held, confirming = row.held, len(outcome.tuning.images["confirm"])
    where = f"on {confirming:,} questions that chose nothing ({100 * held.score:.1f} % for {100 * held.plain:.1f} %)"
    verdict_lines = [
        f"{outcome.name(row)}: {_cost(held.cost, outcome.asked.cost)}, loses {_interval(row)} points {where}"
    ]
    if outcome.verdict.kind == "certified":
        most = f"{100 * held.bound:.1f}, with all tries considered"
        verdict_lines.append(f"The loss is within {_points(target.loss)}: it is at most {most}.")
    elif outcome.verdict.kind == "likely":
        verdict_lines.append(_unsure(outcome, row))
    if held.attempt > 1 or (outcome.verdict.kind == "certified" and len(outcome.tuning.tries) > 1):
        verdict_lines.append(
            f"{len(outcome.tuning.tries)} candidates were tried on these questions, the cheapest first."
        )
    return verdict_lines


def _unsure(outcome: SearchOutcome, row: CandidateRow) -> str:
    assert row.held is not None
    count, images = len(outcome.tuning.images["confirm"]), len(set(outcome.tuning.images["confirm"]))
    within = f"The estimate is within {_points(outcome.tuning.target.loss)}, but"
    if math.isinf(row.held.bound):
        return f"{within} {images} images are too few to confirm it; at least {LEAST_IMAGES} are needed."
    reach = f"the loss may reach {100 * row.held.bound:.1f}"
    return f"{within} {count:,} questions are too few to confirm it: {reach}. Ask more questions."


def _nothing(outcome: SearchOutcome) -> str:
    row, target = outcome.verdict.row, outcome.tuning.target
    if row is None:
        return "Nothing meets it: no candidate can run; tune.csv says why."
    if row.out and row.out.why == "cost":
        most, what = _cost(target.most, outcome.asked.cost), "Nothing that runs" if outcome.broken else "Nothing"
        return (
            f"{what} costs at most {most}; the cheapest is {outcome.name(row)}, {_cost(row.cost, outcome.asked.cost)}."
        )
    within = f" at {_cost(target.most, outcome.asked.cost)}" if target.most is not None else ""
    return _lossy(outcome, row, f"{_points(target.loss)}{within}")


def _lossy(outcome: SearchOutcome, row: CandidateRow, wished: str) -> str:
    """Return that no candidate is known to lose so little, and the nearest candidate.

    Also say whether the intervals rule the target out or only the estimates miss it.
    """
    loss, doubtful = outcome.tuning.target.loss, outcome.tuning.in_doubt()
    assert loss is not None
    half, cost = ("confirms", row.held.cost) if row.held else ("chooses", row.cost)
    loses = f"loses {_interval(row)} points on the half that {half}"
    nearest = f"the nearest, {outcome.name(row)}, {_cost(cost, outcome.asked.cost)}, {loses}"
    if row.lost <= loss:
        return f"No loss within {wished} is confirmed; {nearest}, which alone is not enough: ask more questions."
    if not doubtful:
        return f"Nothing is within {wished}: {nearest}, so {100 * loss:g} is ruled out."
    estimates = (
        f"No estimate within {wished} is confirmed" if outcome.tuning.tries else f"No estimate is within {wished}"
    )
    whom = "" if row in doubtful else f" for {outcome.name(doubtful[0])}"
    return f"{estimates}; {nearest}, so {100 * loss:g} is not ruled out{whom}: ask more questions."


def _print(outcome: SearchOutcome, folder: Path, args: Namespace) -> None:
    task = outcome.asked.task
    print(f"{task.name}: {task.about}; {task.metric.about}; {len(task.samples):,} questions\n")
    if asked := [row for row in outcome.rows if not outcome.too_costly(row)]:
        table(outcome, asked).print()
    for name, why in outcome.broken.items():
        print(f"\n{name} {why}")
    if lines := _left_out(outcome):
        print("\n" + "\n".join(lines))
    print("\n" + "\n".join(sentences(outcome)))
    print(f"{outcome.tuning.answers:,} of the {outcome.grid:,} answers that the whole grid would take")
    if outcome.chosen:
        print(f"use it: vlmzip ask IMAGE QUESTION --model {args.model} --method {folder / FILE}")
    print(f"written to {folder}")


def _left_out(outcome: SearchOutcome) -> list[str]:
    """Return a line for each reason why candidates are missing from the table."""
    dear = [row for row in outcome.rows if outcome.too_costly(row)]  # the cheapest first
    lines = []
    if dear:
        methods = _by_method([outcome.method(row) for row in dear])
        cheapest = f"{outcome.name(dear[0])}, {_cost(dear[0].cost, outcome.asked.cost)}"
        were = "candidate was" if len(dear) == 1 else "candidates were"
        lines.append(f"{len(dear):,} {were} not asked because of the cost ({methods}); the cheapest: {cheapest}")
    if outcome.impossible:
        methods = _by_method([configuration.method for configuration in outcome.impossible])
        pairs = "combination" if len(outcome.impossible) == 1 else "combinations"
        lines.append(
            f"{len(outcome.impossible):,} {pairs} of method and budget cannot run ({methods}); tune.csv says why"
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


def as_json(outcome: SearchOutcome, args: Namespace) -> dict[str, object]:
    """Return the results for JSON. Scores, losses and shares are from 0 to 1; an unknown bound is null."""
    folder, target = outcome.asked.study.folder, outcome.tuning.target
    return {
        "model": args.model,
        "task": outcome.asked.task.name,
        "out": str(folder),
        "cost": outcome.asked.cost,
        "most": target.most,
        "loss": target.loss,
        "verdict": outcome.verdict.kind,
        "said": sentences(outcome),
        "chosen": table(outcome, [outcome.chosen]).as_json()[0] if outcome.chosen else None,
        "compressor": str(folder / FILE) if outcome.chosen else None,
        "tries": len(outcome.tuning.tries),
        "answers": outcome.tuning.answers,
        "grid": outcome.grid,
        "questions": {part: len(images) for part, images in outcome.tuning.images.items()},
        "candidates": table(outcome, outcome.rows).as_json(),
        "broken": outcome.broken,
        "impossible": [
            {"method": configuration.method, "budget": configuration.budget, "note": configuration.note}
            for configuration in outcome.impossible
        ],
    }


def table(outcome: SearchOutcome, rows: Sequence[CandidateRow]) -> Table[CandidateRow]:
    """Return candidates as rows. CSV has scores in percent, JSON from 0 to 1."""
    configurations, costs = outcome.asked.configurations, ["tokens", "flops", *["ms"] * (outcome.asked.cost == "ms")]
    columns: list[Column[CandidateRow]] = [
        Column(lambda row: configurations[row.number].method, key="method", csv=("method",)),
        Column(lambda row: configurations[row.number].budget, key="budget", csv=("budget",)),
        Column(outcome.name, "candidate", key="compressor", csv=("compressor",)),
        *(_cost_column(outcome, name) for name in COST_TEXTS),
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
        Column(outcome.fate, FATE, key="fate", csv=("fate",)),
        Column(lambda row: outcome.detail(row) or None, key="detail", csv=("detail",)),
        *(_condition_column(outcome, name) for name in outcome.asked.study.conditions),
    ]  # fmt: skip
    return Table(
        columns, rows, ["candidate", *(COST_TEXTS[name][0] for name in costs), "asked", "score %", "loss", FATE]
    )


def _cost_column(outcome: SearchOutcome, name: str) -> Column[CandidateRow]:
    heading, text = COST_TEXTS[name]
    return Column(
        lambda row: outcome.costs(row).get(name, ABSENT), heading, text.format, name, (name,), "{:.4f}".format
    )


def _condition_column(outcome: SearchOutcome, name: str) -> Column[CandidateRow]:
    return Column(lambda row: outcome.asked.study.conditions[name] if row is outcome.chosen else ABSENT, csv=(name,))


def _confirmed(row: CandidateRow) -> object:
    """Return the result on the confirming half for JSON; an unknown bound is null."""
    if row.held is None:
        return ABSENT
    bound = None if math.isinf(row.held.bound) else row.held.bound
    return row.held._asdict() | {"loss": vars(row.held.loss), "bound": bound}


def _csv(outcome: SearchOutcome) -> list[dict[str, object]]:
    """Return the rows of the CSV.

    They are the uncompressed model, the candidates, methods that broke, and combinations that cannot run, with the
    reasons.
    """
    rows = [_plain_line(outcome), *table(outcome, outcome.rows).as_csv()]
    rows += [_broken_line(outcome, number) for number in outcome.asked.failures if number not in outcome.tuning.rows]
    rows += [
        {"method": configuration.method, "budget": configuration.budget, "detail": configuration.note}
        for configuration in outcome.impossible
    ]
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, "") for name in columns} for row in rows]


def _plain_line(outcome: SearchOutcome) -> dict[str, object]:
    configuration, plain = outcome.asked.configurations[PLAIN], outcome.tuning.plain
    line: dict[str, object] = {
        "method": configuration.method,
        "budget": configuration.budget,
        "compressor": configuration.method,
    }
    if not plain.asked:
        return line
    costs = {name: f"{value:.4f}" for name, value in outcome.asked.means(PLAIN).items()}
    return line | costs | {"asked": plain.asked, "score": _percent(plain.score)}


def _broken_line(outcome: SearchOutcome, number: int) -> dict[str, object]:
    """Return the row of a method that broke when it was timed and so never became a candidate."""
    configuration, (name, why) = outcome.asked.configurations[number], outcome.broke(number)
    return {
        "method": configuration.method,
        "budget": configuration.budget,
        "compressor": name,
        "fate": FATES["broke"],
        "detail": why,
    }


def _percents(estimate: Estimate) -> tuple[str, ...]:
    return tuple(map(_percent, (estimate.value, estimate.low, estimate.high)))


def _percent(share: float) -> str:
    return "" if math.isinf(share) else f"{100 * share:.2f}"
