"""The base class of all methods: a frozen dataclass with settings as fields, and a method `assign`."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, Self, SupportsIndex, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlmzip import own_files, schema
from vlmzip.errors import BudgetError as BudgetError
from vlmzip.errors import UserError, check_choice
from vlmzip.keep import A_NINTH, Keep, count_to_keep, parse_keep, round_half_up, shared_out
from vlmzip.sites import SIGNALS_OF_TEXT, Cost, Kind
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens

Positions = Literal["contiguous", "original"]

Method = TypeVar("Method", bound="Compressor")

#: A budget counts as met if the reached retention ratio differs from it by at most this fraction.
NEAR = 0.05


@dataclass(frozen=True)
class Profile:
    """The sizes of a model that a budget depends on."""

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
        """Return the grids of all views."""
        return (self.grid, *self.tiles)

    @property
    def size(self) -> int:
        """Return the number of visual tokens of the image."""
        return sum(grid.size for grid in self.grids)


def at_least(share: float) -> str:
    """Return the remedy for a budget below what a method can reach."""
    return f"needs {math.ceil(100 * share)}%"


def nearest_to(
    target: float, make: Callable[[int], Method], ratio: Callable[[Method], float], steps: Sequence[int]
) -> Method:
    """Return the configuration whose ratio is nearest to `target`. Ratios rise with the step from which it is made."""
    above = bisect_right(steps, target, key=lambda step: ratio(make(step)))
    near = map(make, steps[max(above - 1, 0) : above + 1])
    return min(near, key=lambda method: abs(ratio(method) - target))


def check_ascending(layer: Sequence[int], example: str) -> None:
    """Raise `UserError` unless the layers are in ascending order, as those of `example` are."""
    if not layer or list(layer) != sorted(set(layer)):
        raise UserError(f"layer must be in ascending order, such as {example}, got {layer!r}")


def missed(keep: Keep, reached: float, profile: Profile) -> str:
    """Return a note about a budget that is not met, or "" for one that is nearly met."""
    target = count_to_keep(keep, profile.size) / profile.size
    return "" if abs(reached - target) <= NEAR * target else f"the nearest to {target:.1%} that it has is {reached:.1%}"


@dataclass(frozen=True)
class Measured:
    """The measurements of a view, or of several views of an image that get one factor."""

    size: int
    """Visual tokens on the grid."""
    counts: dict[int, int]
    """Output tokens by factor, ascending from 1."""
    deviations: dict[int, float]
    """Deviation inside windows by factor, without factor 1."""

    @classmethod
    def of(cls, method: Calibratable, tokens: VisualTokens) -> list[Measured]:
        """Return the measurements of each view of a batch."""
        grid = tokens.grid or Grid(1, 1, tokens.features.shape[1] - tokens.prefix)
        counts = method.counts_by_factor(grid)
        deviations = method.deviations(tokens).tolist()
        return [cls(grid.size, counts, dict(zip(list(counts)[1:], row, strict=True))) for row in deviations]

    @staticmethod
    def parts(views: Sequence[Measured], *, are_frames: bool) -> list[Sequence[Measured]]:
        """Return the first view of an image, and its other views if it has any; the frames of a video are one part."""
        return [views] if are_frames or len(views) == 1 else [views[:1], views[1:]]

    @classmethod
    def joined(cls, views: Sequence[Measured]) -> Measured:
        """Return the measurements of several views that get one factor, which must divide the grids of all.

        The deviation is the mean over views, weighted by their sizes.
        """
        size = sum(view.size for view in views)
        factors = [factor for factor in views[0].counts if all(factor in view.counts for view in views)]
        counts = {factor: sum(view.counts[factor] for view in views) for factor in factors}
        deviations = {f: sum(view.deviations[f] * view.size for view in views) / size for f in factors if f > 1}
        return cls(size, counts, deviations)

    def factor_below(self, threshold: float) -> int:
        """Return the largest factor with a deviation below the threshold, or 1."""
        return max((factor for factor, deviation in self.deviations.items() if deviation < threshold), default=1)


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC):
    """A compression method. It maps each visual token to an output token and a weight, and knows no model.

    A method is a frozen dataclass with `assign`. Its fields are the options of the command line, the keys of a saved
    `compressor.json` and the rows of the documentation's table.
    """

    paper: ClassVar[str] = ""
    """The method's source, such as "arXiv:2412.04467" or "baseline of arXiv:2406.20092"."""
    kind: ClassVar[Kind] = "prune"
    """Whether it drops tokens ("prune"), joins similar ones ("merge"), does both, or joins neighbours ("pool")."""
    cost: ClassVar[Cost] = "N"
    """How its time grows with the number of tokens N of a view and the number k that it keeps."""
    published: ClassVar[Mapping[int, float]] = {}
    """The published share of LLaVA-1.5-7B's score that remains, in percent, by visual tokens kept of 576."""
    published_in: ClassVar[str] = ""
    """The source of `published`. Values of different sources cannot be compared: their benchmarks differ."""
    examples: ClassVar[tuple[str, ...]] = ()
    """Settings to start with, such as "keep=64": `vlmzip methods NAME` shows them, and the shared tests run them."""
    needs: ClassVar[frozenset[Signal]] = frozenset()
    """The signals that it uses in addition to the features. Settings can add some, so read an instance's value."""
    sites: ClassVar[tuple[Site, ...]] = (Site.PRE_PROJECTOR,)
    """The sites at which it can act."""
    trained_weights: ClassVar[bool] = False
    """Whether it has weights that must be trained before its answers are useful."""
    budget_fields: ClassVar[tuple[str, ...]] = ("keep",)
    """The fields that set how many tokens it keeps. `at_budget` and calibration only change these."""
    changes_nothing: ClassVar[bool] = False
    """Whether it keeps every token on purpose, so that no warning is needed."""
    label_fields: ClassVar[tuple[str, ...]] = ()
    """The fields that a table of stages shows even at their defaults, because stages differ in them."""
    restores: ClassVar[bool] = False
    """Whether all tokens come back after each layer. Such a method acts on every layer from K on, inside the LLM. The
    layer sees the output tokens; every token then gets the layer's change of the output token that it joined."""
    for_training_only: ClassVar[bool] = False
    """Whether it is for training only: a model cannot be evaluated, saved or served with it."""
    sees_clip: ClassVar[bool] = False
    """Whether it sees all frames of a video at once, as one view. Otherwise it sees each frame as a view."""
    videos_only: ClassVar[bool] = False
    """Whether it leaves single images as they are."""
    by_frame: ClassVar[bool] = False
    """Whether it acts on each frame of a video separately inside the LLM, too, where other methods see one sequence."""
    drops_patches: ClassVar[bool] = False
    """Whether it drops visual tokens at the pixel site, before the vision encoder. Its features are then the pixels, in
    [0, 1], of the patches that make each token, and the encoder gets only the patches of the remaining tokens."""
    asks_next_layer: ClassVar[bool] = False
    """Whether its `text_attention` is that of the layer that runs next, on the tokens that enter it. Otherwise it is
    that of the layer before."""
    default_positions: ClassVar[Positions | None] = None
    """The meaning of `positions=None` for this method. If this is `None`, the model's family decides."""

    site: Site = Site.PRE_PROJECTOR
    """The site at which the method acts, between image and answer."""
    positions: Positions | None = None
    """Positions in the LLM. "contiguous" renumbers the remaining tokens in the method's order. "original" keeps the
    positions of their anchors and sorts the tokens by anchor. The default follows the papers: contiguous, or original
    for families whose positions have several axes (Qwen)."""

    @abstractmethod
    def assign(self, tokens: VisualTokens) -> TokenMap:
        """Return the token map. It is only called to keep fewer than all tokens, and runs without gradients."""

    def candidates(self, tokens: VisualTokens) -> TokenMap:
        """Return the map whose output tokens the question attends to in `VisualTokens.candidate_attention`.

        It is called before `assign`, on tokens without this signal. By default these are all tokens.
        """
        batch, count, _ = tokens.features.shape
        return TokenMap.identity(batch, count, tokens.features.device)

    def token_count(self, grid: Grid) -> int | None:
        """Return the number of output tokens of a view with this grid, or `None` if it depends on the content."""
        return None

    @property
    def whole_views(self) -> bool:
        """Return whether it acts on whole views, including the padding of tiles that the LLM otherwise does not see."""
        return self.site is Site.PIXELS

    @property
    def by_view(self) -> bool:
        """Return whether it acts on each view of an image separately.

        Methods before the LLM do. Inside the LLM an image's tokens are one sequence, unless a method needs a grid.
        """
        return self.site is not Site.IN_LLM

    def acts_on(self, views: Sequence[Grid]) -> Sequence[Grid]:
        """Return the grids on which it acts separately: those of the views, or one for the whole image."""
        if self.by_view or len(views) == 1:
            return views
        return [Grid(1, 1, sum(grid.size for grid in views))]

    def image_count(self, views: Sequence[Grid]) -> int | None:
        """Return the number of output tokens of an image with these views, or `None` if it depends on the content."""
        parts = self.acts_on(views)
        counts = [share.token_count(grid) for share, grid in zip(self.shared(parts), parts, strict=True)]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def least_count(self, views: Sequence[Grid]) -> int:
        """Return the fewest output tokens that an image with these views can have, whatever it shows."""
        parts = self.acts_on(views)
        return sum(share.least_of_view(grid) for share, grid in zip(self.shared(parts), parts, strict=True))

    def least_of_view(self, grid: Grid) -> int:
        """Return the fewest output tokens that a view with this grid can have."""
        if (count := self.token_count(grid)) is not None:
            return min(count, grid.size)
        return min(self.counts_by_factor(grid).values()) if isinstance(self, Calibratable) else 1

    def upper_count(self, profile: Profile) -> int | None:
        """Return the number of output tokens of a common image, by which papers call a budget.

        VisionZip's "160" for LLaVA-NeXT is 32 tokens of each of 5 views. Images with fewer tiles keep fewer tokens, so
        the average is lower. `None` if the number depends on the content.
        """
        return self.image_count(profile.grids)

    def shared(self, views: Sequence[Grid]) -> Sequence[Self]:
        """Return the compressor for each view of an image. A count to keep is divided among the views."""
        keep = getattr(self, "keep", None)
        count = None if keep is None or len(views) == 1 else parse_keep(keep)
        if not isinstance(count, int):
            return (self,) * len(views)
        return [self.with_fields(keep=share) for share in shared_out(count, [grid.size for grid in views])]

    def together(self, views: int) -> Self:
        """Return the compressor for an image whose tokens lie on no grids any more and come from so many views."""
        return self

    def arrange(
        self, views: Sequence[Grid], prefix: int, ranks: Sequence[Int[Tensor, " _"]]
    ) -> Int[Tensor, " features"]:
        """Return the order in which the LLM gets an image's output tokens, for contiguous positions.

        `ranks` has, for each output token of each view, the rank of its anchor in the model's own order, in which the
        rows of tiles may interleave. By default, several views are in this order, and a single view is in its map's
        order.
        """
        if len(views) == 1:
            return torch.arange(len(ranks[0]))
        return torch.cat(list(ranks)).argsort(stable=True)

    def encoder_layers(self, depth: int) -> tuple[int, ...]:
        """Return the layers of a vision encoder of `depth` layers, 0-based, that `attention_received` begins with.

        The layer that gives the features follows them in every case. Raise `UserError` for layers that do not exist.
        """
        return ()

    def smaller(self, grid: Grid) -> Grid:
        """Return the grid of the smaller image to encode instead of an image of `grid`. Only used at the pixel site."""
        return grid

    def __call__(self, tokens: VisualTokens) -> TokenMap:
        """Return the token map: the result of `assign`, or the identity if all tokens are to be kept."""
        grid = tokens.grid or Grid(1, 1, tokens.features.shape[1] - tokens.prefix)
        count = self.token_count(grid)
        if count is not None and count >= grid.size:
            return keep_all(tokens)
        with torch.no_grad():
            token_map = self.assign(tokens)
        if not type(self).__module__.startswith("vlmzip.methods."):
            token_map.check()
        return token_map

    def grid_of(self, tokens: VisualTokens) -> Grid:
        """Return the grid that the tokens lie on. Raise `UserError` after a method that leaves no grid."""
        if tokens.grid is None:
            raise UserError(f"{self.name()} needs tokens that lie on a grid; put it before the method that leaves none")
        return tokens.grid

    def at_budget(self, keep: Keep, profile: Profile) -> tuple[Compressor, float]:
        """Return the configuration nearest to an average budget, and the retention ratio that it reaches.

        Raise `BudgetError` with the reason if the method cannot meet the budget.
        """
        if self.videos_only:
            raise BudgetError(
                f"{self.name()} keeps all tokens of an image: it drops tokens of videos only", remedy="for videos"
            )
        if isinstance(self, Calibratable):
            raise self._content_decides()
        if "keep" not in self.field_names():
            raise BudgetError(f"{self.name()} has no budget to set")
        method = self.placed(profile)
        method.check_layers(profile.layers, profile.first_layer)
        if method.layers:
            keep = method._count_inside(keep, profile)
        chosen = method.with_keep(keep)
        return chosen, chosen.reached(profile)

    def at_keep(self, keep: Keep, profile: Profile) -> tuple[Compressor, float]:
        """Return the configuration that leaves nearest to `keep` tokens, and the retention ratio after it acted.

        For a method before the LLM this is its configuration at the average budget. Raise `BudgetError` as `at_budget`.
        """
        method = self.placed(profile)
        if not method.layers or "keep" not in self.field_names():
            return self.at_budget(keep, profile)
        method.check_layers(profile.layers, profile.first_layer)
        chosen = method.with_keep(keep)
        return chosen, chosen.left(profile)

    def with_keep(self, keep: Keep) -> Compressor:
        """Return the same method with another budget per image."""
        return self.with_fields(keep=keep)

    def with_fields(self, **values: Any) -> Self:
        """Return the same method with other values of some of its fields."""
        return dataclasses.replace(self, **values)

    def at_step(self, step: int, salt: int = 0) -> Compressor:
        """Return the compressor for an optimiser step of training. Only methods with randomness change.

        `step` identifies the step, and `salt` the forward pass within it (process and accumulated batch). Equal
        arguments give equal results, so that a run can resume.
        """
        return self

    def placed(self, profile: Profile) -> Self:
        """Return the method with its default layer moved to the first layer that this LLM can use, if it is too early.

        Layers that differ from the default do not move: `check_layers` refuses them.
        """
        default = {field.name: field.default for field in fields(self)}.get("layer")
        if self.layers != (default,) or self.layers[0] >= profile.first_layer:
            return self
        return self.with_fields(layer=profile.first_layer)

    def check_layers(self, depth: int, first: int = 1) -> None:
        """Raise `BudgetError` if the layers are not inside an LLM of `depth` layers.

        `first` is the first layer that may see fewer tokens.
        """
        for layer in self.layers:
            if not 1 <= layer < depth:
                raise BudgetError(
                    f"layer must be from {first} to {depth - 1} in this LLM of {depth} layers, got {layer};"
                    f" to act before the LLM, give site={Site.PRE_PROJECTOR} or {Site.POST_PROJECTOR}"
                )
            if layer < first:
                raise BudgetError(
                    f"layer={layer} is too early in this LLM, whose layers before {first} still get features of the"
                    f" image: give {first} to {depth - 1}"
                )

    def _count_inside(self, keep: Keep, profile: Profile) -> int:
        """Return the tokens to keep from its first layer on, so that the average over all LLM layers is `keep`."""
        size, depth, first = profile.size, profile.layers, min(self.layers)
        left = (count_to_keep(keep, size) * depth - size * first) / (depth - first)
        if left < 1:
            least = (first + (depth - first) / size) / depth
            raise self._too_small(least, depth)
        return min(round_half_up(left), size)

    def _too_small(self, least: float, depth: int) -> BudgetError:
        """Return the error for an average budget below `least`, the share that it keeps at best."""
        return BudgetError(
            f"{min(self.layers)} of {depth} layers see all tokens before {self.name()} acts:"
            f" on average at least {least:.1%}",
            remedy=at_least(least),
        )

    @property
    def layers(self) -> tuple[int, ...]:
        """Return the first LLM layers that see fewer tokens, 0-based. Empty for a method before the LLM."""
        layer = getattr(self, "layer", None)
        return (layer,) if self.site is Site.IN_LLM and layer is not None else ()

    @property
    def text_aware(self) -> bool:
        """Return whether the kept tokens depend on the question."""
        return bool(self.needs & SIGNALS_OF_TEXT)

    def stages(self) -> tuple[Compressor, ...]:
        """Return the compressors that it consists of, in the order in which tokens pass them."""
        return (self,)

    def tokens_by_layer(self, profile: Profile) -> list[int] | None:
        """Return an image's visual tokens at each LLM layer, or `None` if they depend on the content."""
        steps = [(layer, stage) for stage in self.stages() for layer in stage.layers or (None,)]
        steps.sort(key=lambda step: step[0] or 0)  # stages before the LLM come first, in their order
        views: Sequence[Grid] = profile.grids
        size, counts = profile.size, list[int]()
        for layer, stage in steps:
            if layer is not None:
                if layer >= profile.layers:
                    break
                counts += [size] * (layer - len(counts))
                if size != profile.size:  # the grids of the views are lost
                    stage = stage.together(len(profile.grids))
            count = stage.count_at(layer, views)
            if count is None:
                return None
            if count != size:
                views, size = (Grid(1, 1, count),), count
        return counts + [size] * (profile.layers - len(counts))

    def count_at(self, layer: int | None, views: Sequence[Grid]) -> int | None:
        """Return the number of an image's tokens after it acts at an LLM layer; `None` if it depends on the content.

        `layer` is `None` for a method before the LLM. `views` are the grids of the tokens that reach the method.
        """
        count = self.image_count(views)
        return None if count is None else min(count, sum(grid.size for grid in views))

    def cases_by_layer(self, profile: Profile) -> list[list[int]] | None:
        """Return `tokens_by_layer` for each equally likely outcome of the method's randomness."""
        self.check_layers(profile.layers, profile.first_layer)
        counts = self.tokens_by_layer(profile)
        return None if counts is None else [counts]

    def reached(self, profile: Profile) -> float:
        """Return the retention ratio of an image of the profile, averaged over all LLM layers."""
        self.check_layers(profile.layers, profile.first_layer)
        counts = self.tokens_by_layer(profile)
        if counts is None:
            raise self._content_decides()
        return sum(counts) / (profile.size * profile.layers)

    def left(self, profile: Profile) -> float:
        """Return the share of the tokens of an image of the profile that the last LLM layer sees."""
        counts = self.tokens_by_layer(profile)
        if counts is None:
            raise self._content_decides()
        return counts[-1] / profile.size

    def _content_decides(self) -> BudgetError:
        if not isinstance(self, Calibratable):
            return BudgetError(f"the number of tokens that {self.name()} keeps depends on the image")
        return BudgetError(
            f"the number of tokens that {self.name()} keeps depends on the images",
            remedy="calibrate it",
            advice="set its threshold from your images with `vlmzip calibrate`",
        )

    @classmethod
    def name(cls) -> str:
        """Return the name on the command line, which is the stem of the method's file name."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def field_names(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    def to_dict(self) -> dict[str, object]:
        """Return the method's name and fields as JSON values. An outside method's name is its module and class."""
        is_shipped = type(self).__module__.startswith("vlmzip.methods.")
        method = self.name() if is_shipped else f"{type(self).__module__}:{type(self).__qualname__}"
        return {"method": method, **{name: getattr(self, name) for name in self.field_names()}}

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[object, ...]:
        """Pickle a method from the user's own file by its settings, so that other processes can find the file."""
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
    """Tokens per view (int) of an image with several views, such as tiles, or per frame of a video. Give it instead of
    `keep`, which is the number for all views together."""

    @property
    def budget(self) -> Keep:
        """Return the budget of the tokens on which it acts together: `keep_per_view` if it is set, otherwise `keep`."""
        keep = self.keep if self.keep_per_view is None else self.keep_per_view
        return A_NINTH if keep is None else keep

    def count(self, available: int) -> int:
        """Return the number of tokens to keep out of `available`."""
        return count_to_keep(self.budget, available)

    def token_count(self, grid: Grid) -> int | None:
        return self.count(grid.size)

    def with_keep(self, keep: Keep) -> Compressor:
        return self.with_fields(keep=keep, keep_per_view=None)

    @property
    def by_view(self) -> bool:
        return super().by_view or self.keep_per_view is not None

    def shared(self, views: Sequence[Grid]) -> Sequence[Self]:
        if self.keep_per_view is None:
            return super().shared(views)
        return [self.together(grid.frames) for grid in views]

    def together(self, views: int) -> Self:
        per_view = None if self.keep_per_view is None or views == 1 else parse_keep(self.keep_per_view)
        return self.with_fields(keep=per_view * views, keep_per_view=None) if isinstance(per_view, int) else self

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_per_view is None:
            return
        default = next(field.default for field in fields(self) if field.name == "keep")
        if self.keep not in (default, self.keep_per_view):
            raise UserError("give either keep (per image) or keep_per_view (per view), not both")
        object.__setattr__(self, "keep", default)  # files of older versions have `keep_per_view` in both fields


def keep_all(tokens: VisualTokens) -> TokenMap:
    """Return the map that keeps the tokens that the LLM gets without compression."""
    batch, count, _ = tokens.features.shape
    plain = TokenMap.identity(batch, tokens.plain_count, tokens.features.device)
    return plain.after_dropping(count - tokens.plain_count)


@runtime_checkable
class Calibratable(Protocol):
    """A compressor that keeps a number of tokens that depends on the image, by a threshold; see `vlmzip.calibrate`.

    Each image gets the largest factor with a deviation below the threshold, or factor 1.
    """

    threshold: ClassVar[str]
    """The name of the field that calibration sets, a number of at least 0."""

    def counts_by_factor(self, grid: Grid) -> dict[int, int]:
        """Return the number of output tokens of an image of this grid for each possible factor, ascending from 1."""
        ...

    def deviations(self, tokens: VisualTokens) -> Float[Tensor, "batch factors"]:
        """Return the values to compare with the threshold, for each factor of `counts_by_factor` above 1."""
        ...


@runtime_checkable
class MergesInEncoder(Protocol):
    """A compressor that can merge tokens inside the vision encoder, between attention and MLP of its layers.

    A compressor at the site `encoder` must have these methods.
    """

    def counts_by_layer(self, size: int, left: int, layers: int) -> Sequence[int]:
        """Return the tokens after each layer, from the first to the one that gives the features.

        `size` tokens of a view enter the first of these `layers` layers, and `left` must leave the last one.
        """
        ...

    def join(
        self, keys: Float[Tensor, "batch tokens key_dim"], sizes: Float[Tensor, "batch tokens"], prefix: int, count: int
    ) -> Int[Tensor, "batch tokens"]:
        """Return the 0-based group that each token of a layer joins; each group becomes one token.

        `keys` are the layer's attention keys, mean over heads, and `sizes` the number of patches in each token. The
        `prefix` tokens in front, such as CLS, stay alone: they are the first groups. `count` groups follow.
        """
        ...


@runtime_checkable
class ComparesViews(Protocol):
    """A compressor that can look at all views of an image before it decides what to do to each of them."""

    @property
    def compares_views(self) -> bool:
        """Return whether what it does to a view depends on the content of other views, by its settings.

        `shared_by_content` then replaces `Compressor.shared`.
        """
        ...

    def measured(self, tokens: VisualTokens) -> list[Measured]:
        """Return a measurement of each view."""
        ...

    def shared_by_content(self, views: Sequence[Measured], *, are_frames: bool) -> Sequence[Compressor]:
        """Return the compressor for each view of an image, or each frame of a video, from the measurements of all."""
        ...
