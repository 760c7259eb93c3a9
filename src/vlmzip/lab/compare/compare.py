"""Answer one question with many methods at one budget. A method that fails does not stop the others."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import median

from vlmzip.compressor import BudgetError, Compressor, Profile
from vlmzip.errors import UserError, reason, telling_beyond_positions
from vlmzip.lab.asking import TimedAnswer, answer, attach_and_note, attach_with_notes
from vlmzip.lab.budgets import fit
from vlmzip.methods import NoCompression
from vlmzip.progress import working
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.loading import Loaded
from vlmzip.spec import Candidate

PLAIN = NoCompression.name()


@dataclass
class MethodRow:
    """A method's answer and its costs."""

    method: str
    note: str = ""
    """Why the answer is missing or unusual."""
    remedy: str = ""
    """What to do about a missing answer, in a few words."""
    compressed: CompressedModel | None = None
    first: TimedAnswer | None = None
    differs: bool = False
    """Whether the answer differs from the plain model's."""
    broke: bool = False
    """Whether the method failed with an error other than `UserError`."""
    spent: list[dict[str, float]] = field(default_factory=list)

    @property
    def milliseconds(self) -> dict[str, float]:
        """Return the median of the timed runs, by part."""
        return {part: median(run[part] for run in self.spent) for part in self.spent[0]} if self.spent else {}

    def run(self, loaded: Loaded, inputs: dict[str, object], max_new_tokens: int) -> TimedAnswer:
        assert self.compressed is not None
        with telling_beyond_positions(self._add_note):
            return answer(loaded, self.compressed, inputs, max_new_tokens)

    def _add_note(self, text: str) -> None:
        self.note = "; ".join(filter(None, [self.note, text]))

    def give_up(self, error: Exception) -> None:
        self.note, self.first, self.compressed, self.differs = reason(error), None, None, False
        self.broke = not isinstance(error, UserError)
        self.remedy = (isinstance(error, UserError) and error.remedy) or "see the note"


def compare(
    loaded: Loaded,
    inputs: dict[str, object],
    methods: Iterable[Candidate],
    budget: str | None,
    *,
    repeats: int,
    max_new_tokens: int,
) -> list[MethodRow]:
    """Return a row for each method, the plain model's first. Without a budget, methods keep their own settings.

    The runs of all methods are interleaved, so that other work on the machine affects all alike.
    """
    methods = list(methods)
    plain = MethodRow(PLAIN, compressed=attach_and_note(loaded, NoCompression()))
    with working(PLAIN, (1 + len(methods)) * (1 + repeats)) as work:
        plain.first = plain.run(loaded, inputs, max_new_tokens)  # an error ends the command: nothing can be compared
        work.advance()
        profile = image_profile(loaded, plain.first)
        rows = [plain]
        for candidate in methods:
            work.begin(candidate.name)
            rows.append(_first_run(loaded, inputs, candidate, budget, profile, max_new_tokens))
            work.advance()
        for _ in range(repeats):
            for row in rows:
                work.begin(row.method)
                if row.compressed is not None:
                    try:
                        row.spent.append(row.run(loaded, inputs, max_new_tokens).account.milliseconds)
                    except Exception as error:
                        if row is plain:
                            raise
                        row.give_up(error)
                work.advance()
    for row in rows:
        row.differs = row.first is not None and row.first.text != plain.first.text
    return rows


def image_profile(loaded: Loaded, plain: TimedAnswer) -> Profile:
    """Return the shape that budgets are set for: the grids of the largest image."""
    layouts = [image.layout for image in plain.report.images]
    usual = loaded.family.profile()
    if not layouts:
        return usual
    first, *tiles = max(layouts, key=lambda layout: layout.size).views
    return replace(usual, grid=first, tiles=tuple(tiles))


def configure(candidate: Candidate, budget: str | None, profile: Profile) -> tuple[Compressor, str]:
    """Return the method at the budget and a note. Without a budget, the method keeps its own settings.

    Raise `UserError` with the reason if it cannot run.
    """
    method = candidate.usable()
    if budget is None:
        return method.placed(profile), ""
    try:
        chosen, _, note = fit(method, budget, profile)
        return chosen, note
    except BudgetError as error:
        if not candidate.named or method.tokens_by_layer(profile) is not None:
            raise
        return method, f"runs with its own settings, not at this budget: {error}"


def _first_run(
    loaded: Loaded,
    inputs: dict[str, object],
    candidate: Candidate,
    budget: str | None,
    profile: Profile,
    max_new_tokens: int,
) -> MethodRow:
    """Set a method up and run it once, for the answer and as a warm-up."""
    row = MethodRow(candidate.name)
    try:
        compressor, note = configure(candidate, budget, profile)
        row.compressed, notes = attach_with_notes(loaded, compressor)
        row.note = "; ".join(filter(None, [note, *notes]))
        row.first = row.run(loaded, inputs, max_new_tokens)
    except Exception as error:  # an error in one method must not stop the others
        row.give_up(error)
    return row
