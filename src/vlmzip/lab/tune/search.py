"""Search for the best candidate: cheap enough, within a loss, found with few answers, confirmed on unseen images.

Half of the images choose, the other half confirms. On the choosing half every candidate first answers few questions;
clearly unsuitable candidates are dropped, and the others answer twice as many. The best of many candidates looks better
on the questions that chose it than on others. So its loss is measured again on the confirming half, and that
measurement decides. This module knows neither models nor files: `ask` provides scores and costs."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

from vlmzip.lab.stats import DRAWS, Bootstrap, Estimate, estimate

log = logging.getLogger(__name__)

#: The number of the uncompressed model; candidates are numbered from 1.
PLAIN = 0
#: Questions of the first round, rounded up to whole batches.
FIRST = 64
#: Percentiles of the bootstrap draws. A candidate is dropped if even the lower one says that it is worse.
CLEARLY = (0.5, 99.5)
#: Costs that differ by this share of the lower one count as the same: then the score decides.
ALIKE = 0.05
#: The probability of certifying a candidate whose loss is too large: the part above a 95 % interval.
ERROR = 0.025
#: The smallest number of images with which a candidate can be certified.
LEAST_IMAGES = 20
#: The certifying bound lies far in the tail, so it takes this many times more draws.
FAR_OUT = 5

Part = Literal["choose", "confirm"]


@dataclass(frozen=True)
class Target:
    """A limit on cost, on loss, or on both.

    Both: find the cheapest candidate within both. Cost alone: find the best score. Loss alone: find the cheapest.
    """

    most: float | None = None
    """The largest cost, in the unit of the costs."""
    loss: float | None = None
    """The largest loss against the uncompressed model, as a fraction: 0.02 is two points of a hundred."""


class Answers(NamedTuple):
    """A candidate's answers to the first questions of a part."""

    scores: np.ndarray
    """The score of each question, in the order of the questions."""
    cost: float
    """The mean cost of these questions."""


#: Ask candidates (by number) the first questions of a part. The result lacks candidates that break.
Ask = Callable[[Sequence[int], Part, int], Mapping[int, Answers]]


class Rejection(NamedTuple):
    """The reason why a candidate was dropped."""

    why: Literal["cost", "loss", "behind", "broke", "unconfirmed"]
    than: int = PLAIN
    """The number of the candidate that is clearly better."""


class Confirmation(NamedTuple):
    """A candidate's results on the confirming half."""

    score: float
    plain: float
    """The uncompressed model's score on the confirming half."""
    loss: Estimate
    bound: float
    """An upper bound on the loss that accounts for all tries; infinite for too few images."""
    cost: float
    attempt: int
    """The number of the try, from 1."""


@dataclass(eq=False)
class CandidateRow:
    """A candidate and its results on the choosing half."""

    number: int
    cost: float
    """From answers; before there are any, measured or computed from token counts."""
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    loss: Estimate | None = None
    """The loss against the uncompressed model on the same questions."""
    bound: float = math.inf
    """An upper bound on the loss, at the confidence level of the first try on the confirming half."""
    round: int = 0
    """The last round in which it was asked."""
    out: Rejection | None = None
    held: Confirmation | None = None

    @property
    def asked(self) -> int:
        return len(self.scores)

    @property
    def score(self) -> float:
        return float(self.scores.mean()) if self.asked else 0.0

    @property
    def lost(self) -> float:
        """Return the estimated loss, from the confirming half if there is one; infinite if nothing was asked."""
        known = self.held.loss if self.held else self.loss
        return known.value if known else math.inf

    @property
    def lowest(self) -> float:
        """Return the lower end of the interval of `lost`."""
        known = self.held.loss if self.held else self.loss
        return known.low if known else math.inf

    @property
    def highest(self) -> float:
        """Return the upper end of the interval of `lost`."""
        known = self.held.loss if self.held else self.loss
        return known.high if known else math.inf


class Verdict(NamedTuple):
    """The result of a search.

    certified: the loss is within the target with confidence. likely: the loss is within the target by its estimate, on
    both halves. best: the best score within the cost, without a target loss. nothing: no candidate meets the target.
    """

    kind: Literal["certified", "likely", "best", "nothing"]
    row: CandidateRow | None
    """The choice; for "nothing", the nearest candidate, if any candidate can run."""


@dataclass
class Tuning:
    """One search. `images` has the image of each question of a part; no image may be in both."""

    ask: Ask
    costs: Mapping[int, float]
    """The cost of each candidate before it is asked; 0 if unknown."""
    images: Mapping[Part, Sequence[str]]
    target: Target
    batch: int = 1
    """Questions per batch. Rounds are multiples of it, so that dropping a candidate changes no batch."""
    seed: int = 0
    draws: int = DRAWS
    margin: float = 0.0
    """The relative error of `costs`. A candidate further above `target.most` is not asked at all."""

    def __post_init__(self) -> None:
        shared = set(self.images["choose"]) & set(self.images["confirm"])
        assert not shared, f"{len(shared)} images choose and confirm"
        self.rows = {number: CandidateRow(number, cost) for number, cost in self.costs.items()}
        self.plain = CandidateRow(PLAIN, math.inf)
        self.counts = rounds(len(self.images["choose"]), self.batch)
        self.tries: list[CandidateRow] = []
        self._bootstrap = cache(lambda count: Bootstrap(self.images["choose"][:count], self.seed, self.draws))
        for row in self.rows.values():
            if self.target.most is not None and row.cost > self.target.most * (1 + self.margin):
                row.out = Rejection("cost")

    @property
    def answers(self) -> int:
        """Return the number of answers used, including those of the uncompressed model."""
        confirming = len(self.images["confirm"]) * (len(self.tries) + bool(self.tries))
        return self.plain.asked + sum(row.asked for row in self.rows.values()) + confirming

    def run(self) -> Verdict:
        """Search, and confirm the first choice; if that fails, search on for the next one."""
        while True:
            self._search()
            row = self._choice()
            if row is None:
                return self._unsure()
            held = self._confirm(row)
            if held is not None and self._within(held.cost, row):
                if self.target.loss is None:
                    return Verdict("best", row)
                if held.bound <= self.target.loss:
                    return Verdict("certified", row)
            row.out = row.out or Rejection("unconfirmed")

    # ------------------------------------------------------------ the choosing half

    def waiting(self) -> list[CandidateRow]:
        """Return the candidates that need no more questions, because a cheaper one currently meets the target."""
        active = self._active()
        return [row for row in self.rows.values() if row.out is None and row not in active]

    def in_doubt(self) -> list[CandidateRow]:
        """Return the candidates whose interval does not rule out the target loss.

        Leave out candidates that are clearly worse than another: their loss can be within the target only if the
        other's is.
        """
        gone = ("cost", "broke", "behind")
        rows = [row for row in self.rows.values() if not row.out or row.out.why not in gone]
        target_loss = -math.inf if self.target.loss is None else self.target.loss
        return sorted((row for row in rows if row.lowest <= target_loss), key=lambda row: (row.lost, row.cost))

    def _search(self) -> None:
        """Ask until every relevant candidate has answered all questions of the choosing half."""
        while True:
            asked = [row.asked for row in self._active() if row.asked < self.counts[-1]]
            if not asked:
                return
            self._round(next(count for count in self.counts if count > min(asked)))

    def _round(self, count: int) -> None:
        rows = [row for row in self._active() if row.asked < count]
        answers = self.ask([PLAIN, *(row.number for row in rows)], "choose", count)
        if self.plain.asked < count:
            self.plain.scores = answers[PLAIN].scores
        for row in rows:
            self._take(row, answers.get(row.number))
            row.round = self.counts.index(count) + 1
        self._judge([row for row in rows if row.out is None], count)
        gone = sum(row.out is not None for row in rows)
        log.info(f"{count:,} questions to {len(rows):,} candidates: {gone:,} dropped")

    def _take(self, row: CandidateRow, answered: Answers | None) -> None:
        if answered is None:
            row.out = Rejection("broke")
            return
        row.scores, row.cost = answered
        self._within(row.cost, row)

    def _within(self, cost: float, row: CandidateRow) -> bool:
        """Return whether a cost is within the target; if not, drop the candidate."""
        if self.target.most is not None and cost > self.target.most:
            row.out = Rejection("cost")
            return False
        return True

    def _judge(self, rows: Sequence[CandidateRow], count: int) -> None:
        """Compare candidates that have just answered `count` questions with all that have answered these."""
        known = [row for row in self.rows.values() if row.out is None and row.asked >= count]
        scores = np.stack([row.scores[:count] for row in [self.plain, *known]], axis=1)
        drawn = self._bootstrap(count).means(scores)
        of = {row.number: column for row, column in zip(known, drawn.T[1:], strict=True)}
        for row in rows:
            row.loss = estimate(drawn[:, 0] - of[row.number])
            row.bound = self._bound(row, count)
        for row in rows:
            low = np.percentile(drawn[1:, 0] - of[row.number][1:], CLEARLY[0])
            rival = self._rival(row, known, of)
            if self.target.loss is not None and low > self.target.loss:
                row.out = Rejection("loss")
            elif np.percentile(of[rival.number][1:] - of[row.number][1:], CLEARLY[0]) > 0:
                row.out = Rejection("behind", rival.number)

    def _rival(self, row: CandidateRow, known: Sequence[CandidateRow], of: Mapping[int, np.ndarray]) -> CandidateRow:
        """Return the candidate with the best score among those that would be preferred to `row` at a better score.

        With a target loss, these must not cost more.
        """
        dear = math.inf if self.target.loss is None else row.cost * (1 + ALIKE)
        return max((rival for rival in known if rival.cost <= dear), key=lambda rival: of[rival.number][0])

    def _bound(self, row: CandidateRow, count: int) -> float:
        assert row.loss is not None
        if self.target.loss is None or row.loss.high > self.target.loss:
            return math.inf  # it lies above the interval's end: not worth the draws
        losses = self.plain.scores[:count] - row.scores[:count]
        return bound(losses, self.images["choose"][:count], error_of(1), self.seed, self.draws)

    def _good(self) -> list[CandidateRow]:
        """Return the candidates whose loss is certified on the choosing half and less than that of all failed tries."""
        if self.target.loss is None:
            return []
        least = min((row.loss.value for row in self.tries if row.out and row.loss), default=math.inf)
        judged = [(row, row.loss) for row in self.rows.values() if row.out is None and row.loss]
        return [row for row, loss in judged if row.bound <= self.target.loss and loss.value < least]

    def _active(self) -> list[CandidateRow]:
        running = [row for row in self.rows.values() if row.out is None]
        good = self._good()
        if not good:
            return running
        dear = min(row.cost for row in good) * (1 + ALIKE)
        return [row for row in running if row.cost <= dear]

    def _choice(self) -> CandidateRow | None:
        """Return the next candidate to confirm, if any."""
        rows = self._active() if self.target.loss is None else self._good()
        return next(iter(self._order([row for row in rows if row.asked == self.counts[-1]])), None)

    def _order(self, rows: Sequence[CandidateRow]) -> list[CandidateRow]:
        """Sort candidates, best first: by score, or with a target loss by cost, and by score among similar costs."""

        def by_score(alike: Sequence[CandidateRow]) -> list[CandidateRow]:
            return sorted(alike, key=lambda row: (-row.score, row.cost, row.number))

        if self.target.loss is None:
            return by_score(rows)
        left, ordered = sorted(rows, key=lambda row: row.cost), []
        while left:
            alike = [row for row in left if row.cost <= left[0].cost * (1 + ALIKE)]
            ordered += by_score(alike)
            left = left[len(alike) :]
        return ordered

    # ------------------------------------------------------------ the confirming half

    def _confirm(self, row: CandidateRow) -> Confirmation | None:
        """Measure a candidate on the confirming half, whose images chose nothing. Return `None` if it breaks."""
        images = self.images["confirm"]
        answers = self.ask([PLAIN, row.number], "confirm", len(images))
        if row.number not in answers:
            row.out = Rejection("broke")
            return None
        self.tries.append(row)
        scores = np.stack([answers[PLAIN].scores, answers[row.number].scores], axis=1)
        drawn = Bootstrap(images, self.seed, self.draws).means(scores)
        highest = bound(scores[:, 0] - scores[:, 1], images, error_of(len(self.tries)), self.seed, FAR_OUT * self.draws)
        plain, score = map(float, scores.mean(0))
        loss = estimate(drawn[:, 0] - drawn[:, 1])
        row.held = Confirmation(score, plain, loss, highest, answers[row.number].cost, len(self.tries))
        log.info(f"confirming, try {len(self.tries)}: {len(images):,} questions")
        return row.held

    def _unsure(self) -> Verdict:
        """Return the verdict if no candidate is certified: the safest one whose estimate is within the target."""
        target_loss = self.target.loss
        if target_loss is None:
            return Verdict("nothing", self._nearest())
        if not self.tries:
            hopeful = [row for row in self.rows.values() if row.out is None and row.lost <= target_loss]
            safest = min(hopeful, key=lambda row: (row.highest, row.cost), default=None)
            held = self._confirm(safest) if safest else None
            if safest and held and self._within(held.cost, safest) and held.bound <= target_loss:
                return Verdict("certified", safest)
        likely = [row for row in self.tries if row.lost <= target_loss and row.out != Rejection("cost")]
        if likely:
            return Verdict("likely", min(likely, key=lambda row: (row.highest, row.cost)))
        return Verdict("nothing", self._nearest())

    def _nearest(self) -> CandidateRow | None:
        """Return the candidate nearest to an unmet target: by loss among those that are cheap enough, else by cost.

        Losses on different questions are not comparable, so candidates that answered most questions come first.
        """
        rows = [row for row in self.rows.values() if not row.out or row.out.why not in ("cost", "broke")]
        if judged := [row for row in rows if row.asked]:
            return min(judged, key=lambda row: (-row.asked, row.lost, row.cost))
        dear = [row for row in self.rows.values() if row.out and row.out.why == "cost"]
        return min(dear, key=lambda row: row.cost, default=None)


def rounds(questions: int, batch: int) -> list[int]:
    """Return how many questions have been asked at the end of each round: doubling whole batches, then all."""
    counts, count = [], math.ceil(FIRST / batch) * batch
    while count < questions:
        counts.append(count)
        count *= 2
    return [*counts, questions]


def error_of(attempt: int) -> float:
    """Return how often an attempt may certify wrongly: 1/2, 1/6, 1/12, … of `ERROR`, in total at most `ERROR`."""
    return ERROR / (attempt * (attempt + 1))


def bound(losses: np.ndarray, images: Sequence[str], error: float, seed: int, draws: int) -> float:
    """Return a bound that the mean loss exceeds in at most a share `error` of cases; infinite for too few images.

    The draws alone are too confident if losses are rare, because an unseen loss is never drawn. So one image is added,
    with the largest number of questions per image, all of them lost: questions about an image can fail together.
    """
    of = Counter(images)
    if len(of) < LEAST_IMAGES:
        return math.inf
    more = np.ones(max(of.values()))
    again = ["\0"] * len(more)  # the name of no image
    drawn = Bootstrap([*images, *again], seed, draws).share(np.append(losses, more), np.ones(len(losses) + len(more)))
    return float(np.percentile(drawn[1:], 100 * (1 - error)))
