"""Which of many candidates to take: cheap enough, within a loss, found with few answers, confirmed on unseen images.

Half of the images choose, the other half confirms. In the choosing half every candidate answers few questions at
first, those that are clearly out are dropped, and the rest goes on to twice as many. The best of many is better on the
questions that chose it than elsewhere; its loss is therefore measured again on the other half, by which nothing was
chosen, and that measurement decides. Nothing here knows models or files: `ask` brings scores and costs.
"""

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
#: Percentiles of the draws between which there must be nothing left to hope for, before a candidate is dropped.
CLEARLY = (0.5, 99.5)
#: Costs that differ by this share of the lower one count as the same: then the score decides.
ALIKE = 0.05
#: How often a candidate may be certified that loses more than it may: what lies above a 95 % interval.
ERROR = 0.025
#: With fewer images than this the draws say too little to certify anything.
LEAST_IMAGES = 20
#: How many times as many draws the bound takes that certifies, since it lies far out.
FAR_OUT = 5

Part = Literal["choose", "confirm"]


@dataclass(frozen=True)
class Target:
    """What is asked. Both: the cheapest that meets both; a cost alone: the best score; a loss alone: the cheapest."""

    most: float | None = None
    """What a candidate may cost at most, in the unit of its costs."""
    loss: float | None = None
    """What it may lose at most against the uncompressed model, as a share: 0.02 is two points of a hundred."""


class Answers(NamedTuple):
    """What came of asking a candidate the first questions of a part."""

    scores: np.ndarray
    """Of each question, in their order."""
    cost: float
    """The mean over these questions."""


#: Has the candidates answer the first so many questions of a part. One that breaks is missing in what comes back.
Ask = Callable[[Sequence[int], Part, int], Mapping[int, Answers]]


class Rejection(NamedTuple):
    """Why a candidate was dropped."""

    why: Literal["cost", "loss", "behind", "broke", "unconfirmed"]
    than: int = PLAIN
    """Whom it is clearly behind."""


class Confirmation(NamedTuple):
    """What the confirming half says of a candidate."""

    score: float
    plain: float
    """The uncompressed model's score there."""
    loss: Estimate
    bound: float
    """What the loss stays under, all tries considered; infinite where the images are too few to say."""
    cost: float
    attempt: int
    """1 for the first candidate that was tried."""


@dataclass(eq=False)
class CandidateRow:
    """A candidate and what is known of it from the choosing half."""

    number: int
    cost: float
    """From the shape of the tokens at first, or measured; from answers as soon as there are some."""
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    loss: Estimate | None = None
    """Against the uncompressed model on the same questions."""
    bound: float = math.inf
    """What the loss stays under, as certain as the first try of the confirming half has to be."""
    round: int = 0
    """The last round that it was asked in."""
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
        """The estimate of the loss, from the confirming half where there is one; infinite where nothing was asked."""
        known = self.held.loss if self.held else self.loss
        return known.value if known else math.inf

    @property
    def lowest(self) -> float:
        """The lower end of that estimate's interval."""
        known = self.held.loss if self.held else self.loss
        return known.low if known else math.inf

    @property
    def highest(self) -> float:
        """The upper end of that estimate's interval."""
        known = self.held.loss if self.held else self.loss
        return known.high if known else math.inf


class Verdict(NamedTuple):
    """How it ended. certified: the loss is surely within what is wished; likely: its estimate is, on both halves; best:
    the best score within the cost, no loss being wished for; nothing: nobody meets the target."""

    kind: Literal["certified", "likely", "best", "nothing"]
    row: CandidateRow | None
    """The choice; for "nothing" whoever came nearest, if anybody was asked."""


@dataclass
class Tuning:
    """One search. `images` has the image of each question of a part; no image may be in both."""

    ask: Ask
    costs: Mapping[int, float]
    """What is known of each candidate's cost before it is asked."""
    images: Mapping[Part, Sequence[str]]
    target: Target
    batch: int = 1
    """Rounds are multiples of it, so that no batch is cut differently because a candidate was dropped."""
    seed: int = 0
    draws: int = DRAWS
    margin: float = 0.0
    """By which share a cost known beforehand may be wrong: more above `target.most` than that is not even asked."""

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
        """How many answers were looked at, the uncompressed model's among them."""
        confirming = len(self.images["confirm"]) * (len(self.tries) + bool(self.tries))
        return self.plain.asked + sum(row.asked for row in self.rows.values()) + confirming

    def run(self) -> Verdict:
        """Searches, and confirms the first choice; where that fails, the next one."""
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
        """Candidates that need not be asked more: something cheaper meets the target as things stand."""
        active = self._active()
        return [row for row in self.rows.values() if row.out is None and row not in active]

    def in_doubt(self) -> list[CandidateRow]:
        """Candidates that the wished loss is not ruled out for: it is no less than the lower end of their interval.

        Whatever is clearly behind another is left out: for its loss to be small enough, that other's must be."""
        gone = ("cost", "broke", "behind")
        rows = [row for row in self.rows.values() if not row.out or row.out.why not in gone]
        wished = -math.inf if self.target.loss is None else self.target.loss
        return sorted((row for row in rows if row.lowest <= wished), key=lambda row: (row.lost, row.cost))

    def _search(self) -> None:
        """Asks until every candidate that matters has answered all questions of the choosing half."""
        while True:
            asked = [row.asked for row in self._active() if row.asked < self.counts[-1]]
            if not asked:
                return
            self._round(next(count for count in self.counts if count > min(asked)))

    def _round(self, count: int) -> None:
        asked = [row for row in self._active() if row.asked < count]
        found = self.ask([PLAIN, *(row.number for row in asked)], "choose", count)
        if self.plain.asked < count:
            self.plain.scores = found[PLAIN].scores
        for row in asked:
            self._take(row, found.get(row.number))
            row.round = self.counts.index(count) + 1
        self._judge([row for row in asked if row.out is None], count)
        gone = sum(row.out is not None for row in asked)
        log.info(f"{count:,} questions to {len(asked):,} candidates: {gone:,} dropped")

    def _take(self, row: CandidateRow, answered: Answers | None) -> None:
        if answered is None:
            row.out = Rejection("broke")
            return
        row.scores, row.cost = answered
        self._within(row.cost, row)

    def _within(self, cost: float, row: CandidateRow) -> bool:
        """Whether a cost is one that is wished for; else the candidate is out."""
        if self.target.most is not None and cost > self.target.most:
            row.out = Rejection("cost")
            return False
        return True

    def _judge(self, asked: Sequence[CandidateRow], count: int) -> None:
        """Compares those that have just answered `count` questions, on these questions, with all that have."""
        known = [row for row in self.rows.values() if row.out is None and row.asked >= count]
        scores = np.stack([row.scores[:count] for row in [self.plain, *known]], axis=1)
        drawn = self._bootstrap(count).means(scores)
        of = {row.number: column for row, column in zip(known, drawn.T[1:], strict=True)}
        for row in asked:
            row.loss = estimate(drawn[:, 0] - of[row.number])
            row.bound = self._bound(row, count)
        for row in asked:
            low = np.percentile(drawn[1:, 0] - of[row.number][1:], CLEARLY[0])
            rival = self._rival(row, known, of)
            if self.target.loss is not None and low > self.target.loss:
                row.out = Rejection("loss")
            elif np.percentile(of[rival.number][1:] - of[row.number][1:], CLEARLY[0]) > 0:
                row.out = Rejection("behind", rival.number)

    def _rival(self, row: CandidateRow, known: Sequence[CandidateRow], of: Mapping[int, np.ndarray]) -> CandidateRow:
        """The best score among those that would be taken before `row` if they are better: with a wished loss, they must
        not cost more."""
        dear = math.inf if self.target.loss is None else row.cost * (1 + ALIKE)
        return max((one for one in known if one.cost <= dear), key=lambda one: of[one.number][0])

    def _bound(self, row: CandidateRow, count: int) -> float:
        assert row.loss is not None
        if self.target.loss is None or row.loss.high > self.target.loss:
            return math.inf  # it lies above the interval's end: not worth the draws
        losses = self.plain.scores[:count] - row.scores[:count]
        return bound(losses, self.images["choose"][:count], error_of(1), self.seed, self.draws)

    def _good(self) -> list[CandidateRow]:
        """Those that would be certified here, had nothing been chosen, and that look better than all tried in vain."""
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
        """Whom to confirm next."""
        rows = self._active() if self.target.loss is None else self._good()
        return next(iter(self._order([row for row in rows if row.asked == self.counts[-1]])), None)

    def _order(self, rows: Sequence[CandidateRow]) -> list[CandidateRow]:
        """Best first: by score, or where a loss is wished, by cost, and by score among costs that are alike."""

        def by_score(some: Sequence[CandidateRow]) -> list[CandidateRow]:
            return sorted(some, key=lambda row: (-row.score, row.cost, row.number))

        if self.target.loss is None:
            return by_score(rows)
        left, found = sorted(rows, key=lambda row: row.cost), []
        while left:
            alike = [row for row in left if row.cost <= left[0].cost * (1 + ALIKE)]
            found += by_score(alike)
            left = left[len(alike) :]
        return found

    # ------------------------------------------------------------ the confirming half

    def _confirm(self, row: CandidateRow) -> Confirmation | None:
        """Measures a candidate on images that nothing was chosen by; `None` where it breaks."""
        images = self.images["confirm"]
        found = self.ask([PLAIN, row.number], "confirm", len(images))
        if row.number not in found:
            row.out = Rejection("broke")
            return None
        self.tries.append(row)
        scores = np.stack([found[PLAIN].scores, found[row.number].scores], axis=1)
        drawn = Bootstrap(images, self.seed, self.draws).means(scores)
        highest = bound(scores[:, 0] - scores[:, 1], images, error_of(len(self.tries)), self.seed, FAR_OUT * self.draws)
        plain, score = map(float, scores.mean(0))
        loss = estimate(drawn[:, 0] - drawn[:, 1])
        row.held = Confirmation(score, plain, loss, highest, found[row.number].cost, len(self.tries))
        log.info(f"confirming, try {len(self.tries)}: {len(images):,} questions")
        return row.held

    def _unsure(self) -> Verdict:
        """Nobody is certified: who is within the wished loss by estimate, and safest?"""
        wished = self.target.loss
        if wished is None:
            return Verdict("nothing", self._nearest())
        if not self.tries:
            hopeful = [row for row in self.rows.values() if row.out is None and row.lost <= wished]
            safest = min(hopeful, key=lambda row: (row.highest, row.cost), default=None)
            held = self._confirm(safest) if safest else None
            if safest and held and self._within(held.cost, safest) and held.bound <= wished:
                return Verdict("certified", safest)
        likely = [row for row in self.tries if row.lost <= wished and row.out != Rejection("cost")]
        if likely:
            return Verdict("likely", min(likely, key=lambda row: (row.highest, row.cost)))
        return Verdict("nothing", self._nearest())

    def _nearest(self) -> CandidateRow | None:
        """Who comes nearest to a target that nobody meets: by loss among those that are cheap enough, else by cost.

        Losses on different questions do not compare: who was asked most comes first."""
        rows = [row for row in self.rows.values() if not row.out or row.out.why not in ("cost", "broke")]
        if judged := [row for row in rows if row.asked]:
            return min(judged, key=lambda row: (-row.asked, row.lost, row.cost))
        dear = [row for row in self.rows.values() if row.out and row.out.why == "cost"]
        return min(dear, key=lambda row: row.cost, default=None)


def rounds(questions: int, batch: int) -> list[int]:
    """How many questions have been asked at the end of each round: doubling whole batches, then all."""
    counts, count = [], math.ceil(FIRST / batch) * batch
    while count < questions:
        counts.append(count)
        count *= 2
    return [*counts, questions]


def error_of(attempt: int) -> float:
    """How often the attempt may certify wrongly: 1/2, 1/6, 1/12, … of `ERROR`, which all together never exceed it."""
    return ERROR / (attempt * (attempt + 1))


def bound(losses: np.ndarray, images: Sequence[str], error: float, seed: int, draws: int) -> float:
    """What the mean loss stays under, but for a share `error` of cases.

    The draws alone are too sure where losses are rare: what was not seen is never drawn. So one image more is
    counted, with as many questions as any other and all of them lost: questions about an image can fail together.
    """
    of = Counter(images)
    if len(of) < LEAST_IMAGES:
        return math.inf
    more = np.ones(max(of.values()))
    again = ["\0"] * len(more)  # the name of no image
    drawn = Bootstrap([*images, *again], seed, draws).share(np.append(losses, more), np.ones(len(losses) + len(more)))
    return float(np.percentile(drawn[1:], 100 * (1 - error)))
