"""The layout of an image: its views and the token of each placeholder. Also the output of a vision encoder."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, VisualTokens

Kind = TypeVar("Kind", bound=Hashable)

#: The value in `Layout.slots` of a placeholder that holds no visual token, such as the newline after a row.
SEPARATOR = -1

#: A model's own packing. It takes one feature per token of each view and returns one feature per placeholder, with
#: `SEPARATOR` for separators.
Pack = Callable[[Float[Tensor, "views tokens 1"]], Float[Tensor, "placeholders 1"]]


#: The pixels of several views: one batch if all have the same size, or a list with one tensor per view.
Pixels = Float[Tensor, "views 3 height width"] | Sequence[Float[Tensor, "3 _ _"]]


@dataclass(frozen=True, eq=False)
class Layout:
    """The views of an image and the token of each placeholder. It follows from shapes alone, before encoding.

    An image consists of views: a base image and its tiles, or the frames of a video. Its tokens are numbered through
    all views. In each view, the `prefix` tokens (CLS) come first, followed by the grid in raster order. The LLM does
    not see tokens without a placeholder: CLS in most models, and tokens in the padding of a tile.
    """

    views: tuple[Grid, ...]
    """The grid of each view."""
    slots: Int[Tensor, " placeholders"]
    """The token number of each placeholder, or `SEPARATOR` for a newline. On the CPU."""
    prefix: int = 0
    """Number of tokens of each view before its grid."""
    padded_slots: Int[Tensor, " padded_placeholders"] | None = None
    """The value of `slots` if padding had placeholders, too. `None` for images without padding."""
    is_video: bool = field(default=False, kw_only=True)
    """True if the views are the frames of a video, in order of time."""

    @classmethod
    def of_one_view(cls, grid: Grid, prefix: int = 0, *, passes_prefix: bool = False) -> Layout:
        """Return the layout of a single view without separators. The LLM sees the prefix if `passes_prefix` is set."""
        first = 0 if passes_prefix else prefix
        return cls((grid,), torch.arange(first, prefix + grid.size), prefix)

    @classmethod
    def of_frames(cls, frame: Grid, frames: int, prefix: int = 0, *, passes_prefix: bool = False) -> Layout:
        """Return the layout of a video without separators: the placeholders of a frame follow those of the last."""
        first = 0 if passes_prefix else prefix
        numbers = torch.arange(frames * (prefix + frame.size)).view(frames, -1)
        return cls((frame,) * frames, numbers[:, first:].flatten(), prefix, is_video=True)

    @classmethod
    def of_single_views(cls, grids: Sequence[Grid]) -> list[Layout]:
        """Return the layouts of images of one view each. Images of equal grid share one layout and its cache."""
        return cls.of_equal_views([(grid, 1) for grid in grids])

    @classmethod
    def of_equal_views(cls, images: Sequence[tuple[Grid, int]]) -> list[Layout]:
        """Return the layouts of images whose views follow one after another, without separators.

        `images` has the grid of each view and the number of views. Equal images share one layout and its cache.
        """
        return cls.of_views([(grid,) * count for grid, count in images])

    @classmethod
    def of_views(cls, images: Sequence[tuple[Grid, ...]]) -> list[Layout]:
        """Return the layouts of images with these views, which follow one after another, without separators.

        Equal images share one layout and its cache.
        """
        layouts = {views: cls(views, torch.arange(sum(grid.size for grid in views))) for views in dict.fromkeys(images)}
        return [layouts[views] for views in images]

    @cached_property
    def starts(self) -> list[int]:
        """The number of the first token of each view, followed by the count of all tokens."""
        return [0, *accumulate(self.prefix + grid.size for grid in self.views)]

    @property
    def tokens(self) -> int:
        """The count of tokens of all views, including those that the LLM does not see."""
        return self.starts[-1]

    @cached_property
    def separators(self) -> int:
        """The count of placeholders that hold no token."""
        return int((self.slots < 0).sum())

    @property
    def placeholders(self) -> int:
        """The count of visual tokens that the LLM gets without compression, including separators."""
        return len(self.slots)

    @property
    def size(self) -> int:
        """The count of tokens in all grids, without prefixes."""
        return sum(grid.size for grid in self.views)

    @cached_property
    def has_placeholder(self) -> Tensor:
        """A boolean mask of [tokens], true for tokens that the LLM sees."""
        marks = torch.zeros(self.tokens, dtype=torch.bool)
        marks[self.slots[self.slots >= 0]] = True
        return marks

    @cached_property
    def numbers(self) -> Int[Tensor, " placeholders"]:
        """The token number of each placeholder. Separators are numbered after all tokens."""
        separator = self.slots < 0
        return torch.where(separator, self.tokens + separator.cumsum(0) - 1, self.slots)

    def placeholders_of(self, view: int) -> Int[Tensor, " tokens"]:
        """Return the placeholders of a view, in the order of its tokens."""
        placeholders = ((self.slots >= self.starts[view]) & (self.slots < self.starts[view + 1])).nonzero()[:, 0]
        return placeholders[self.slots[placeholders].argsort()]

    @cached_property
    def passes_prefix(self) -> bool:
        """True if the LLM sees the tokens before the grids."""
        return self.prefix > 0 and bool(self.has_placeholder[: self.prefix].all())

    @cached_property
    def is_seen_whole(self) -> bool:
        """True if the LLM sees every token of every grid."""
        return all(bool(self.has_placeholder[start + self.prefix : end].all()) for start, end in pairwise(self.starts))

    @cached_property
    def as_seen(self) -> Layout:
        """The layout without a prefix that has no placeholder. Tokens are renumbered."""
        if self.prefix == 0 or self.passes_prefix:
            return self
        numbers = self.has_placeholder.cumsum(0) - 1
        slots = torch.where(self.slots < 0, SEPARATOR, numbers[self.slots])
        return Layout(self.views, slots, is_video=self.is_video)

    @cached_property
    def as_clip(self) -> Layout:
        """The layout of a video as one view of all frames; the prefixes of all frames come first.

        Images, and videos of one frame, are left as they are.
        """
        if not self.is_video or len(self.views) == 1:
            return self
        frames, (_, rows, cols), size = len(self.views), self.views[0], self.views[0].size
        frame, token = self.slots // (self.prefix + size), self.slots % (self.prefix + size)
        on_grid = frames * self.prefix + frame * size + token - self.prefix
        numbers = torch.where(token < self.prefix, frame * self.prefix + token, on_grid)
        slots = torch.where(self.slots < 0, SEPARATOR, numbers)
        return Layout((Grid(frames, rows, cols),), slots, frames * self.prefix, is_video=True)

    def frame_of(self, placeholders: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        """Return the frame of each of these placeholders of a video. Separators, if any, stand after all frames."""
        frames = sum(grid.frames for grid in self.views)
        return placeholders * frames // (self.placeholders - self.separators)

    @cached_property
    def places(self) -> Int[Tensor, " tokens_and_separators"]:
        """The placeholder of each token, followed by the placeholder of each separator.

        A token without a placeholder has the first placeholder of its view.
        """
        index = torch.arange(self.placeholders)
        holds = self.slots >= 0
        places = torch.zeros(self.tokens, dtype=torch.long)
        for start, end in pairwise(self.starts):
            mine = index[(self.slots >= start) & (self.slots < end)]
            places[start:end] = mine[0] if len(mine) else 0
        places[self.slots[holds]] = index[holds]
        return torch.cat([places, index[~holds]])

    @cached_property
    def ranks(self) -> Int[Tensor, " tokens"]:
        """The rank of each token in the order in which the model packs an image, including padding."""
        if self.padded_slots is None:
            return self.places[: self.tokens]
        return Layout(self.views, self.padded_slots, self.prefix).ranks

    def unpadded(self) -> tuple[Layout, list[Window | None]]:
        """Return a layout with each view cropped to the window that the LLM sees, and the window of each view.

        The layout omits a view that lies completely in the padding; its window is `None`. Prefixes stay. Raise
        `ValueError` if the tokens of a view that the LLM sees do not form a rectangle.
        """
        windows = [
            Window.of(self.has_placeholder[start + self.prefix : end].view(tuple(grid)))
            for grid, (start, end) in zip(self.views, pairwise(self.starts), strict=True)
        ]
        numbers, views = torch.full((self.tokens,), SEPARATOR), []
        count = 0
        for grid, start, window in zip(self.views, self.starts, windows, strict=False):
            if window is None:
                continue
            tokens = start + window.tokens(grid, self.prefix)
            numbers[tokens] = torch.arange(count, count + len(tokens))
            count += len(tokens)
            views.append(window.grid(grid))
        slots = torch.where(self.slots < 0, SEPARATOR, numbers[self.slots])
        return Layout(tuple(views), slots, self.prefix, is_video=self.is_video), windows


@dataclass(frozen=True)
class Window:
    """A rectangle of a view's grid: half-open ranges of rows and columns, in all frames."""

    rows: tuple[int, int]
    cols: tuple[int, int]

    @classmethod
    def of(cls, marked: Tensor) -> Window | None:
        """Return the marked rectangle of a boolean mask of [frames, rows, cols], or `None` if nothing is marked."""
        if not marked.any():
            return None
        rows, cols = (marked.any(0).any(axis).nonzero()[:, 0] for axis in (1, 0))
        window = cls((int(rows[0]), int(rows[-1]) + 1), (int(cols[0]), int(cols[-1]) + 1))
        if not marked[:, slice(*window.rows), slice(*window.cols)].all():
            raise ValueError("the placeholders of a view do not form a rectangle of its grid")
        return window

    def grid(self, whole: Grid) -> Grid:
        """Return the grid of the window in a view of grid `whole`."""
        return Grid(whole.frames, self.rows[1] - self.rows[0], self.cols[1] - self.cols[0])

    def tokens(self, whole: Grid, prefix: int) -> Int[Tensor, " tokens"]:
        """Return the numbers of a view's remaining tokens: its prefix and the part of its grid inside the window."""
        numbers = torch.arange(prefix, prefix + whole.size).view(tuple(whole))
        return torch.cat([torch.arange(prefix), numbers[:, slice(*self.rows), slice(*self.cols)].flatten()])


def layout_of(views: tuple[Grid, ...], pack: Pack, prefix: int = 0, pack_padded: Pack | None = None) -> Layout:
    """Return the layout of an image by letting the model pack token numbers instead of features.

    `pack` is the model's own packing. It gets one number for each token that the LLM may see and returns one number per
    placeholder. `prefix` tokens precede the grid of each view, and the LLM does not see them. `pack_padded` is the same
    packing for an image that fills all views; give it if the model cuts off their padding. Raise `ValueError` if views
    differ in size.
    """
    if len({view.size for view in views}) > 1:
        raise ValueError("models pack views of equal size")
    size = views[0].size
    numbers = torch.arange(len(views) * (prefix + size)).view(len(views), prefix + size)[:, prefix:]
    # float32, which every packing accepts, represents integers below 2**24 exactly.
    packs = [pack] if pack_padded is None else [pack, pack_padded]
    slots, *padded = [each(numbers[..., None].to(torch.float32))[:, 0].round().long() for each in packs]
    return Layout(views, slots, prefix, *padded)


def numbers_by_kind(kinds: Iterable[Kind]) -> dict[Kind, list[int]]:
    """Return the 0-based numbers of equal values, by value, in the order in which the values first appear.

    Views or images of one kind, such as those of equal grid, form a batch.
    """
    numbers: dict[Kind, list[int]] = {}
    for number, kind in enumerate(kinds):
        numbers.setdefault(kind, []).append(number)
    return numbers


@dataclass(frozen=True)
class MergeTarget:
    """The part of a view whose tokens the encoder merges, and the number of tokens to leave of it."""

    window: Window
    size: int
    """The number of tokens in the window."""
    left: int


@dataclass(frozen=True)
class MergedViews:
    """The tokens of a batch of views that were merged inside the encoder."""

    token_map: TokenMap
    """The map from the tokens that the encoder would make to those that it made."""
    features: Float[Tensor, "batch left dim"]

    def rows(self, index: Int[Tensor, " rows"]) -> MergedViews:
        """Return the same for some of the views."""
        return MergedViews(self.token_map.rows(index), self.features[index])

    def of_inputs(self, tokens: Int[Tensor, " tokens"]) -> MergedViews:
        """Return the same without the tokens beside `tokens`, which the map must have dropped."""
        return MergedViews(self.token_map.of_inputs(tokens), self.features)


@dataclass(frozen=True)
class Views:
    """A batch of views of equal grid."""

    tokens: VisualTokens
    numbers: Sequence[int]
    """The number of each row's view, counted through all views of all images."""
    streams: tuple[Float[Tensor, "batch tokens stream_dim"], ...] = ()
    """Further features of the same tokens, which layers of the LLM add to them (deepstack)."""
    merged: MergedViews | None = None
    """The result if the encoder merged the tokens. `tokens` then has features of width 0."""

    def rows(self, rows: Sequence[int]) -> Views:
        """Return the views with these row numbers."""
        index = torch.tensor(rows, device=self.tokens.features.device)
        streams = tuple(stream[index] for stream in self.streams)
        merged = self.merged and self.merged.rows(index)
        return Views(self.tokens.rows(index), [self.numbers[row] for row in rows], streams, merged)


@dataclass(frozen=True)
class Encoded:
    """The output of a model's vision encoder for the views of all images."""

    groups: Sequence[Views]
    separator: Float[Tensor, " llm_dim"] | None = None
    """The input of the LLM at a placeholder that is a separator."""
    further: Mapping[str, object] = field(default_factory=dict)
    """What the model's `forward` reads beside the visual tokens, such as the logits of an encoder's router."""
