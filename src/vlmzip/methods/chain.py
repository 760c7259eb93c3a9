"""Several compressors in one model, one after another, such as DFMR before the LLM and FastV inside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmzip.compressor import BudgetError, Compressor, Profile
from vlmzip.errors import UserError
from vlmzip.keep import Keep, count_to_keep
from vlmzip.methods.fastv import FastV
from vlmzip.methods.visionzip import VisionZip
from vlmzip.resampler import Resampler
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Site, VisualTokens

#: The sites in the order in which tokens pass them.
ORDER = tuple(Site)


@dataclass(frozen=True, kw_only=True)
class Chain(Compressor):
    """Run several compressors one after another, each on the tokens that the previous one left.

    This is our own combination; the papers use each method alone. A site or LLM layer takes at most one compressor.
    The compressors are sorted in the order in which tokens pass their sites and layers.

    A method that needs a grid cannot follow a compressor whose tokens lie on none. A compressor with weights
    (`qformer`) must come first. Before the LLM, so must a method that needs more than the visual tokens, such as the
    encoder's attention or the question.

    When it fails: if the first method drops what the second would keep. On mini, VisionZip and then FastV scores less
    than `kmeans` alone at 25 and 11 % of the tokens: 76.5 against 79.8, 72.2 against 74.6 (docs/results.md).
    """

    paper = "our own combination"
    kind = "chain"
    sites = tuple(Site)
    budget_fields = ("compressors",)

    compressors: tuple[Compressor, ...] = (VisionZip(), FastV())
    """The compressors to run, such as `(Pool2d(factor=2), FastV(layer=8))`."""

    def __post_init__(self) -> None:
        stages = [stage for compressor in self.compressors for stage in compressor.stages()]
        if not stages:
            raise UserError("a chain needs at least one compressor")
        stages.sort(key=lambda stage: (ORDER.index(stage.site), min(stage.layers, default=0)))
        places = [(s.site, layer) for s in stages for layer in (s.layers or (None,))]
        for place in places:
            if places.count(place) > 1:
                where = place[0].value if place[1] is None else f"layer {place[1]}"
                raise UserError(f"a chain has two compressors at {where}; give each a different site or layer")
        sites = {stage.site for stage in stages}
        if Site.PIXELS in sites and sites & {Site.ENCODER, Site.PRE_PROJECTOR, Site.POST_PROJECTOR}:
            raise UserError(
                f"after {stages[0].name()}, a chain can compress inside the LLM only; choose methods with site=in_llm"
            )
        inside = [stage for stage in stages if stage.site is Site.IN_LLM]
        alone = next((stage for stage in inside if stage.restores), None)
        if alone is not None and len(inside) > 1:
            raise UserError(
                f"{alone.name()} restores the tokens after each layer, so no other method can act inside the LLM with"
                " it; choose methods before the LLM"
            )
        if {Site.ENCODER, Site.PRE_PROJECTOR} <= sites:
            raise UserError(
                f"after {stages[0].name()} inside the encoder, a chain can compress behind the projector or inside the"
                " LLM only; choose methods with site=post_projector or site=in_llm"
            )
        for stage in stages:
            if stage.for_training_only:
                raise UserError(
                    f"{stage.name()} cannot be chained: it is for training only; make it a separate stage, without +"
                )
        for stage in stages[1:]:
            if isinstance(stage, Resampler):
                raise UserError(f"{stage.name()} must come first in a chain: it needs all tokens of the vision encoder")
            if stage.site is not Site.IN_LLM and stage.needs:
                raise UserError(
                    f"{stage.name()} must come first before the LLM: later stages get only the visual tokens;"
                    " choose methods with site=in_llm to follow it"
                )
        positions = {self.positions, *(stage.positions for stage in stages)} - {None}
        if len(positions) > 1:
            raise UserError("the compressors of a chain have different positions; give all of them the same")
        for stage in stages:  # raises if a compressor does not allow the positions that the others set
            dataclasses.replace(stage, positions=next(iter(positions), None))
        object.__setattr__(self, "compressors", tuple(stages))
        object.__setattr__(self, "positions", next(iter(positions), None))
        object.__setattr__(self, "site", stages[0].site)
        super().__post_init__()

    def stages(self) -> tuple[Compressor, ...]:
        return self.compressors

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(layer for stage in self.compressors for layer in stage.layers)

    def token_count(self, grid: Grid) -> int | None:
        """Return the number of tokens that enter the LLM."""
        counts = self.tokens_by_layer(Profile(grid, layers=1))
        return None if counts is None else counts[0]

    def least_count(self, views: Sequence[Grid]) -> int:
        """Return the fewest tokens of an image that can enter the LLM."""
        for stage in self.compressors:
            if stage.site is not Site.IN_LLM:
                count = stage.least_count(views)
                if count < sum(grid.size for grid in views):
                    views = (Grid(1, 1, count),)
        return sum(grid.size for grid in views)

    def at_budget(self, keep: Keep, profile: Profile) -> tuple[Chain, float]:
        """Fit the first compressor to the budget and leave the others unchanged."""
        nearest = self._fit_first(keep, profile, lambda candidate: candidate.reached(profile))
        return nearest, nearest.reached(profile)

    def at_keep(self, keep: Keep, profile: Profile) -> tuple[Chain, float]:
        """Fit the first compressor so that the chain leaves `keep` tokens. Leave the others unchanged."""
        nearest = self._fit_first(keep, profile, lambda candidate: candidate.left(profile))
        return nearest, nearest.left(profile)

    def _fit_first(self, keep: Keep, profile: Profile, ratio: Callable[[Chain], float]) -> Chain:
        """Return the chain whose first compressor's budget brings the ratio nearest to `keep`."""
        first, *others = self.placed(profile).compressors
        target = count_to_keep(keep, profile.size) / profile.size
        best: tuple[float, Chain] | None = None
        for count in range(1, profile.size + 1):
            try:
                candidate = dataclasses.replace(self, compressors=(first.at_budget(count, profile)[0], *others))
            except BudgetError:
                continue
            miss = abs(ratio(candidate) - target)
            if best is None or miss < best[0]:
                best = miss, candidate
        if best is None or best[0] > 0.5 * target:
            raise BudgetError(
                f"no setting of {first.name()}, the chain's first compressor, brings the chain near {target:.1%}"
            )
        return best[1]

    def at_step(self, step: int, salt: int = 0) -> Chain:
        return dataclasses.replace(self, compressors=tuple(stage.at_step(step, salt) for stage in self.compressors))

    def placed(self, profile: Profile) -> Chain:
        return dataclasses.replace(self, compressors=tuple(stage.placed(profile) for stage in self.compressors))

    def assign(self, tokens: VisualTokens) -> TokenMap:
        raise UserError("a chain acts at several sites and has no single token map; attach it to a model")

    def to_dict(self) -> dict[str, object]:
        return {**super().to_dict(), "compressors": [stage.to_dict() for stage in self.compressors]}
