"""Where each placeholder of an image comes from, known from shapes alone; and what an encoder says about its views."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlmzip.visual_tokens import Grid, VisualTokens

#: What stands in `Layout.slots` for a placeholder that holds no visual token, such as the newline behind a row.
SEPARATOR = -1

#: A model's own packing: one feature per token of each view to one feature per placeholder. Separators become
#: `SEPARATOR`.
Pack = Callable[[Float[Tensor, "views tokens 1"]], Float[Tensor, "placeholders 1"]]


#: The pixels of some views: a batch, if all have the same size, or one by one.
Pixels = Float[Tensor, "views 3 height width"] | Sequence[Float[Tensor, "3 _ _"]]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where each placeholder of an image comes from. Known from shapes alone, before anything is encoded.

    An image consists of views: a base image and its tiles, or the frames of a video. Its tokens are numbered through
    all views, in each view first the `prefix` tokens (CLS), then the grid in raster order. A token without a
    placeholder is one that the LLM does not see: CLS in most models, and what lies in the padding of a tile.
    """

    views: tuple[Grid, ...]
    """The grid of each view."""
    slots: Int[Tensor, " placeholders"]
    """For each placeholder the number of its token; `SEPARATOR` for a newline. On the CPU."""
    prefix: int = 0
    """Tokens of each view before its grid."""
    padded_slots: Int[Tensor, " padded_placeholders"] | None = None
    """As `slots`, if padding had placeholders, too; `None` for images without padding."""

    @classmethod
    def of_one_view(cls, grid: Grid, prefix: int = 0, *, passes_prefix: bool = False) -> Layout:
        """Return the layout of a single view without separators; the LLM sees the prefix only if it is passed."""
        first = 0 if passes_prefix else prefix
        return cls((grid,), torch.arange(first, prefix + grid.size), prefix)

    @classmethod
    def of_single_views(cls, grids: Sequence[Grid]) -> list[Layout]:
        """Return the layouts of images of one view each. Images of equal grid share one, and what it has worked out."""
        layouts = {grid: cls.of_one_view(grid) for grid in dict.fromkeys(grids)}
        return [layouts[grid] for grid in grids]

    @cached_property
    def starts(self) -> list[int]:
        """The number of the first token of each view, and the number of all tokens behind the last."""
        return [0, *accumulate(self.prefix + grid.size for grid in self.views)]

    @property
    def tokens(self) -> int:
        """Tokens of all views, whether the LLM sees them or not."""
        return self.starts[-1]

    @cached_property
    def separators(self) -> int:
        """Placeholders that hold no token."""
        return int((self.slots < 0).sum())

    @property
    def placeholders(self) -> int:
        """Visual tokens of the image that the LLM gets without compression, separators included."""
        return len(self.slots)

    @property
    def size(self) -> int:
        """Tokens of all grids."""
        return sum(grid.size for grid in self.views)

    @cached_property
    def has_placeholder(self) -> Tensor:
        """For each token whether the LLM sees it."""
        marks = torch.zeros(self.tokens, dtype=torch.bool)
        marks[self.slots[self.slots >= 0]] = True
        return marks

    @cached_property
    def numbers(self) -> Int[Tensor, " placeholders"]:
        """For each placeholder the number of its token, or of its separator among those behind all tokens."""
        separator = self.slots < 0
        return torch.where(separator, self.tokens + separator.cumsum(0) - 1, self.slots)

    def placeholders_of(self, view: int) -> Int[Tensor, " tokens"]:
        """Return the placeholders of a view, in the order of its tokens."""
        mine = ((self.slots >= self.starts[view]) & (self.slots < self.starts[view + 1])).nonzero()[:, 0]
        return mine[self.slots[mine].argsort()]

    @cached_property
    def passes_prefix(self) -> bool:
        """Whether the LLM sees the tokens before the grids."""
        return self.prefix > 0 and bool(self.has_placeholder[: self.prefix].all())

    @cached_property
    def is_seen_whole(self) -> bool:
        """Whether the LLM sees every token of every grid."""
        return all(
            bool(self.has_placeholder[start + self.prefix : end].all())
            for start, end in zip(self.starts, self.starts[1:], strict=False)
        )

    @cached_property
    def as_seen(self) -> Layout:
        """The layout of the tokens that the LLM sees: without a prefix that has no placeholder."""
        if self.prefix == 0 or self.passes_prefix:
            return self
        numbers = self.has_placeholder.cumsum(0) - 1
        return Layout(self.views, torch.where(self.slots < 0, SEPARATOR, numbers[self.slots]))

    @cached_property
    def places(self) -> Int[Tensor, " tokens_and_separators"]:
        """For each token, and behind them each separator, its placeholder.

        A token without one stands at the first placeholder of its view.
        """
        index = torch.arange(self.placeholders)
        holds = self.slots >= 0
        places = torch.zeros(self.tokens, dtype=torch.long)
        for start, end in zip(self.starts, self.starts[1:], strict=False):
            mine = index[(self.slots >= start) & (self.slots < end)]
            places[start:end] = mine[0] if len(mine) else 0
        places[self.slots[holds]] = index[holds]
        return torch.cat([places, index[~holds]])

    @cached_property
    def ranks(self) -> Int[Tensor, " tokens"]:
        """For each token its rank in the order in which the model packs an image, padding included."""
        if self.padded_slots is None:
            return self.places[: self.tokens]
        return Layout(self.views, self.padded_slots, self.prefix).ranks

    def unpadded(self) -> tuple[Layout, list[Window | None]]:
        """Return the layout of what the LLM sees of each view, and the window of each view that it sees.

        The window of a view that lies in the padding as a whole is `None`: the layout leaves the view out. Prefixes
        stay. Raises `ValueError` where the tokens seen of a view form no rectangle.
        """
        windows = [
            Window.of(self.has_placeholder[start + self.prefix : end].view(tuple(grid)))
            for grid, start, end in zip(self.views, self.starts, self.starts[1:], strict=False)
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
        return Layout(tuple(views), slots, self.prefix), windows


@dataclass(frozen=True)
class Window:
    """A rectangle of a view's grid: half-open ranges of rows and columns, in all frames."""

    rows: tuple[int, int]
    cols: tuple[int, int]

    @classmethod
    def of(cls, marked: Tensor) -> Window | None:
        """Return the rectangle that is marked in a grid of [frames, rows, cols], `None` if nothing is."""
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
        """Return the numbers of a view's tokens that are left: its prefix, and the grid inside the window."""
        numbers = torch.arange(prefix, prefix + whole.size).view(tuple(whole))
        return torch.cat([torch.arange(prefix), numbers[:, slice(*self.rows), slice(*self.cols)].flatten()])


def layout_of(views: tuple[Grid, ...], pack: Pack, prefix: int = 0, pack_padded: Pack | None = None) -> Layout:
    """Ask a model for the layout of an image: let it pack the numbers of tokens in place of their features.

    `pack` is the model's own packing. It gets one number per token that the LLM may see, all views of equal size, and
    returns one per placeholder. `prefix` tokens of each view stand before its grid, and the LLM does not see them.
    `pack_padded` is the same packing of an image that fills all views, if the model cuts off their padding.
    """
    if len({view.size for view in views}) > 1:
        raise ValueError("models pack views of equal size")
    size = views[0].size
    numbers = torch.arange(len(views) * (prefix + size)).view(len(views), prefix + size)[:, prefix:]
    # Whole numbers below 2**24 are exact in float32, which every packing takes.
    packs = [pack] if pack_padded is None else [pack, pack_padded]
    slots, *padded = [one(numbers[..., None].to(torch.float32))[:, 0].round().long() for one in packs]
    return Layout(views, slots, prefix, *padded)


@dataclass(frozen=True)
class Views:
    """Views of equal grid, batched."""

    tokens: VisualTokens
    numbers: Sequence[int]
    """Which view each row is, counted through all views of all images."""
    streams: tuple[Float[Tensor, "batch tokens stream_dim"], ...] = ()
    """Further features of the same tokens, which later layers of the LLM get (deepstack)."""

    def rows(self, rows: Sequence[int]) -> Views:
        """Return some of the views."""
        index = torch.tensor(rows, device=self.tokens.features.device)
        streams = tuple(stream[index] for stream in self.streams)
        return Views(self.tokens.rows(index), [self.numbers[row] for row in rows], streams)


@dataclass(frozen=True)
class Encoded:
    """What a model's vision encoder says about the views of some images."""

    groups: Sequence[Views]
    separator: Float[Tensor, " llm_dim"] | None = None
    """What the LLM gets where a placeholder is a separator."""
