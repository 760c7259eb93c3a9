"""The base of every method: a frozen dataclass whose fields are its settings, and one method, `assign`."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, Self, SupportsIndex, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlmzip import own_files, schema
from vlmzip.errors import UserError, check_choice
from vlmzip.keep import Keep, count_to_keep, parse_keep, round_half_up, shared_out
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens

Positions = Literal["contiguous", "original"]

#: A budget is met if what is reached is off by this share of it at most.
NEAR = 0.05


@dataclass(frozen=True)
class Profile:
    """The shape of a model, as far as a budget depends on it."""

    grid: Grid
    """The visual tokens of an image, or of its first view."""
    layers: int
    """Decoder layers of the LLM."""
    tiles: tuple[Grid, ...] = ()
    """The visual tokens of further views of the image."""
    first_layer: int = 1
    """The first layer of the LLM before which tokens may go. Models with deepstack add image features up to there."""

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The grids of all views."""
        return (self.grid, *self.tiles)

    @property
    def size(self) -> int:
        """Visual tokens of the image."""
        return sum(grid.size for grid in self.grids)


class BudgetError(UserError):
    """A method cannot reach the budget; the message says why."""


def missed(keep: Keep, reached: float, profile: Profile) -> str:
    """What to say about a budget that was not met; nothing where it was, nearly."""
    wanted = count_to_keep(keep, profile.size) / profile.size
    return "" if abs(reached - wanted) <= NEAR * wanted else f"the nearest to {wanted:.1%} that it has is {reached:.1%}"


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC):
    """Decides which output token each visual token joins, and with what weight; knows no model.

    A method is a frozen dataclass with `assign`. Its fields are at once the options of the command line, the keys of
    a saved `compressor.json` and the rows of the documentation's table.
    """

    paper: ClassVar[str] = ""
    """Where it comes from, such as "arXiv:2412.04467" or "baseline of arXiv:2406.20092"."""
    examples: ClassVar[tuple[str, ...]] = ()
    """Settings to start with, such as "keep=64": `vlmzip methods NAME` shows them, and the shared tests run them."""
    needs: ClassVar[frozenset[Signal]] = frozenset()
    """What it looks at beside the features. Settings can ask for more: an instance's own value is what counts."""
    sites: ClassVar[tuple[Site, ...]] = (Site.PRE_PROJECTOR,)
    """The sites that it can work at."""
    trained_weights: ClassVar[bool] = False
    """Whether it has weights of its own: before they are trained, answers through it mean nothing."""
    budget_fields: ClassVar[tuple[str, ...]] = ("keep",)
    """The fields that say how many tokens it keeps: `at_budget` and calibration set them, and no others."""
    changes_nothing: ClassVar[bool] = False
    """Whether it is meant to keep every token: nobody is warned that it does."""
    label_fields: ClassVar[tuple[str, ...]] = ()
    """The fields that a table of stages shows even at their defaults, because stages differ in them."""
    for_training_only: ClassVar[bool] = False
    """Whether no model is evaluated, saved or served with it."""
    default_positions: ClassVar[Positions | None] = None
    """What `positions=None` means for this method; `None`: what it means in the model's family."""

    site: Site = Site.PRE_PROJECTOR
    """Where on the way from image to answer it acts."""
    positions: Positions | None = None
    """Positions in the LLM: "contiguous" renumbers the tokens left, in the order that the method gives them; "original"
    keeps those of their anchors, and the tokens stand in the order of their anchors. Left out, what the papers use:
    contiguous, or original in families whose positions have several axes (Qwen)."""

    @abstractmethod
    def assign(self, tokens: VisualTokens) -> TokenMap:
        """The map for visual tokens of which fewer than all are wanted. Runs without gradients."""

    def token_count(self, grid: Grid) -> int | None:
        """Output tokens for one view of this grid, known from its shape alone; `None` if its content decides."""
        return None

    @property
    def whole_views(self) -> bool:
        """Whether it acts on whole views, the padding of tiles included, which the LLM does not see otherwise."""
        return self.site is Site.PIXELS

    @property
    def by_view(self) -> bool:
        """Whether it acts on each view of an image by itself: what lies on a grid, or is ranked within an encoder.

        Inside the LLM an image's tokens are one sequence, unless a method needs a grid.
        """
        return self.site is not Site.IN_LLM

    def acts_on(self, views: Sequence[Grid]) -> Sequence[Grid]:
        """Return the grids on which it acts, each by itself: those of the views, or the image as a whole."""
        if self.by_view or len(views) == 1:
            return views
        return [Grid(1, 1, sum(grid.size for grid in views))]

    def image_count(self, views: Sequence[Grid]) -> int | None:
        """Return the output tokens for an image of these views, known from shapes alone; `None` if content decides."""
        parts = self.acts_on(views)
        counts = [share.token_count(grid) for share, grid in zip(self.shared(parts), parts, strict=True)]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def shared(self, views: Sequence[Grid]) -> Sequence[Self]:
        """Return the compressor for each view of an image: a count to keep is shared out over them."""
        keep = getattr(self, "keep", None)
        count = None if keep is None or len(views) == 1 else parse_keep(keep)
        if not isinstance(count, int):
            return (self,) * len(views)
        changes: list[dict[str, Any]] = [{"keep": share} for share in shared_out(count, [grid.size for grid in views])]
        return [dataclasses.replace(self, **change) for change in changes]

    def arrange(
        self, views: Sequence[Grid], prefix: int, ranks: Sequence[Int[Tensor, " _"]]
    ) -> Int[Tensor, " features"]:
        """Return the order in which the LLM gets an image's output tokens, if they are renumbered there.

        `ranks` has for each output of each view the rank of its anchor in the order in which the model packs an image;
        the rows of tiles may interleave there. By default that order, and for a single view the map's own.
        """
        if len(views) == 1:
            return torch.arange(len(ranks[0]))
        return torch.cat(list(ranks)).argsort(stable=True)

    def smaller(self, grid: Grid) -> Grid:
        """The grid of the smaller image to encode instead of one of this grid; asked at the pixel site only."""
        return grid

    def __call__(self, tokens: VisualTokens) -> TokenMap:
        """The map for `tokens`: `assign`, or the identity where as many tokens are wanted as there are."""
        grid = tokens.grid or Grid(1, 1, tokens.features.shape[1] - tokens.prefix)
        wanted = self.token_count(grid)
        if wanted is not None and wanted >= grid.size:
            return keep_all(tokens)
        with torch.no_grad():
            token_map = self.assign(tokens)
        if not type(self).__module__.startswith("vlmzip.methods."):
            token_map.check()
        return token_map

    def grid_of(self, tokens: VisualTokens) -> Grid:
        """Return the grid that the tokens lie on. Raises `UserError` after a method that leaves no grid."""
        if tokens.grid is None:
            raise UserError(f"{self.name()} needs tokens that lie on a grid; put it before the method that leaves none")
        return tokens.grid

    def at_budget(self, keep: Keep, profile: Profile) -> tuple[Compressor, float]:
        """The nearest configuration to an average budget, and the retention ratio that it really reaches.

        Raises `BudgetError` with the reason where the method has no such configuration.
        """
        if isinstance(self, Calibratable):
            raise self._content_decides()
        if "keep" not in self.field_names():
            raise BudgetError(f"{self.name()} has no budget to set")
        self.check_layers(profile.layers, profile.first_layer)
        if self.layers:
            keep = self._count_inside(keep, profile)
        chosen = self.with_keep(keep)
        return chosen, chosen.reached(profile)

    def with_keep(self, keep: Keep) -> Compressor:
        """Return the same method with another budget, of an image."""
        changes: dict[str, Any] = {"keep": keep}
        return dataclasses.replace(self, **changes)

    def at_step(self, step: int, salt: int = 0) -> Compressor:
        """Return the compressor for an optimiser step of training; one that draws nothing at random is the same.

        `step` identifies the step, `salt` the forward within it: process and accumulated batch. Equal arguments give
        an equal result, so that a run can resume.
        """
        return self

    def placed(self, profile: Profile) -> Compressor:
        """The same at layers that this LLM has, for methods whose default layers suit most of them only."""
        default = {field.name: field.default for field in fields(self)}.get("layer")
        if self.layers != (default,) or self.layers[0] >= profile.first_layer:
            return self
        moved: dict[str, Any] = {"layer": profile.first_layer}
        return dataclasses.replace(self, **moved)

    def check_layers(self, depth: int, first: int = 1) -> None:
        """Raises `BudgetError` for layers that are no places inside an LLM of `depth` layers.

        `first` is the first layer before which tokens may go.
        """
        for layer in self.layers:
            if not 1 <= layer < depth:
                raise BudgetError(
                    f"layer={layer} is no place inside this LLM of {depth} layers: give {first} to {depth - 1};"
                    f" before the LLM there are site={Site.PRE_PROJECTOR} and {Site.POST_PROJECTOR}"
                )
            if layer < first:
                raise BudgetError(
                    f"layer={layer} is too early in this LLM, whose layers before {first} still get features of the"
                    f" image: give {first} to {depth - 1}"
                )

    def _count_inside(self, keep: Keep, profile: Profile) -> int:
        """Tokens to keep from its first layer on, so that the average over all layers of the LLM is `keep`."""
        size, depth, first = profile.size, profile.layers, min(self.layers)
        left = (count_to_keep(keep, size) * depth - size * first) / (depth - first)
        if left < 1:
            least = (first + (depth - first) / size) / depth
            raise BudgetError(
                f"{first} of {depth} layers see all tokens before {self.name()} acts: on average at least {least:.1%}"
            )
        return min(round_half_up(left), size)

    @property
    def layers(self) -> tuple[int, ...]:
        """The LLM layers, 0-based, before which it acts: the first that see fewer tokens. Empty before the LLM."""
        layer = getattr(self, "layer", None)
        return (layer,) if self.site is Site.IN_LLM and layer is not None else ()

    @property
    def text_aware(self) -> bool:
        """Whether the question decides which tokens are kept."""
        return bool(self.needs & {Signal.TEXT_ATTENTION, Signal.TEXT_FEATURES})

    def stages(self) -> tuple[Compressor, ...]:
        """The compressors that it consists of, in the order in which tokens meet them."""
        return (self,)

    def tokens_by_layer(self, profile: Profile) -> list[int] | None:
        """Visual tokens of an image of the profile at each LLM layer; `None` if its content decides."""
        count = self.image_count(profile.grids)
        if count is None:
            return None
        first = min(self.layers, default=0)
        return [profile.size] * first + [min(count, profile.size)] * (profile.layers - first)

    def cases_by_layer(self, profile: Profile) -> list[list[int]] | None:
        """Return `tokens_by_layer` for each case that a random draw decides on, all equally likely."""
        self.check_layers(profile.layers, profile.first_layer)
        counts = self.tokens_by_layer(profile)
        return None if counts is None else [counts]

    def reached(self, profile: Profile) -> float:
        """The retention ratio on an image of the profile, over all layers of the LLM."""
        self.check_layers(profile.layers, profile.first_layer)
        counts = self.tokens_by_layer(profile)
        if counts is None:
            raise self._content_decides()
        return sum(counts) / (profile.size * profile.layers)

    def _content_decides(self) -> BudgetError:
        if not isinstance(self, Calibratable):
            return BudgetError(f"what {self.name()} keeps depends on the image")
        return BudgetError(
            f"what {self.name()} keeps depends on the images: set its threshold from images of yours with"
            " `vlmzip calibrate`"
        )

    @classmethod
    def name(cls) -> str:
        """The name on the command line: the stem of the file that holds the method."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def field_names(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    def to_dict(self) -> dict[str, object]:
        """The method's name (module and class, for a method from elsewhere) and fields, as JSON can hold them."""
        own = type(self).__module__.startswith("vlmzip.methods.")
        method = self.name() if own else f"{type(self).__module__}:{type(self).__qualname__}"
        return {"method": method, **{name: getattr(self, name) for name in self.field_names()}}

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[object, ...]:
        """Pickle a method from a file of the user's own by its settings: another process has to find the file first."""
        cls = type(self)
        if not own_files.is_own(cls.__module__):
            return super().__reduce_ex__(protocol)
        settings = {name: getattr(self, name) for name in self.field_names()}
        return own_files.make, (cls.__module__, cls.__qualname__, settings)

    def __post_init__(self) -> None:
        check_choice("site", self.site, self.sites)
        schema.check(self)


@dataclass(frozen=True, kw_only=True)
class BudgetedCompressor(Compressor):
    """A method that keeps a number of tokens, or a fraction of them."""

    budget_fields: ClassVar[tuple[str, ...]] = ("keep", "keep_per_view")

    keep: Keep | None = None
    """Tokens per image (int), or a fraction of them (float, "25%")."""
    keep_per_view: Keep | None = None
    """Tokens per view (int) of images that have several, such as tiles, in place of `keep`, which the views share."""

    def with_keep(self, keep: Keep) -> Compressor:
        return dataclasses.replace(self, keep=keep, keep_per_view=None)

    def shared(self, views: Sequence[Grid]) -> Sequence[Self]:
        return super().shared(views) if self.keep_per_view is None else (self,) * len(views)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_per_view is None:
            return
        default = next(field.default for field in fields(self) if field.name == "keep")
        if self.keep not in (default, self.keep_per_view):
            raise UserError("give keep, for an image, or keep_per_view, for each of its views, not both")
        object.__setattr__(self, "keep", self.keep_per_view)


def keep_all(tokens: VisualTokens) -> TokenMap:
    """Return the map that leaves the model what it gets without compression."""
    batch, count, _ = tokens.features.shape
    plain = TokenMap.identity(batch, tokens.plain_count, tokens.features.device)
    return plain.after_dropping(count - tokens.plain_count)


@runtime_checkable
class Calibratable(Protocol):
    """A compressor whose threshold decides by an image's content how many tokens it keeps; see `vlmzip.calibrate`.

    Each image gets a factor: 1, or the largest whose deviation lies below the threshold.
    """

    threshold: ClassVar[str]
    """The field that calibration sets: a number of at least 0."""

    def counts_by_factor(self, grid: Grid) -> dict[int, int]:
        """Output tokens of an image of this grid for each factor it can get, factors ascending from 1."""
        ...

    def deviations(self, tokens: VisualTokens) -> Float[Tensor, "batch factors"]:
        """What is compared with the threshold: a column for each factor of `counts_by_factor` beyond 1."""
        ...
