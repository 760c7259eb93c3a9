"""What the runtime did to the images of one call: counts, maps and times."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models.layout import Layout
from vlmzip.runtime.compress import in_order
from vlmzip.runtime.detail import detail_lost
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, VisualTokens


@dataclass(frozen=True)
class ImageReport:
    """One image: where it stands in the batch, and what became of its visual tokens."""

    row: int
    before: int
    """Visual tokens that the LLM would get without compression."""
    after: int
    """Visual tokens that the LLM gets; inside it they may become fewer, see `by_layer`."""
    by_layer: tuple[int, ...]
    """Visual tokens at each layer of the LLM."""
    token_map: TokenMap | None
    """The map of this image alone (a batch of one), from the tokens of all its views to those of the last layer.

    `None` after a resampler, whose tokens come from everywhere in the image."""
    layout: Layout
    """Of the image's views: the tokens that the map begins with, and behind them the separators."""
    view_features: tuple[Float[Tensor, "_ dim"], ...] | None
    """The visual tokens of each view before compression, without gradients; kept until the next call, for
    `detail_lost`.

    `None` where they are not to be compared: only a smaller image was encoded, or they were resampled."""

    @property
    def features(self) -> Float[Tensor, "tokens dim"] | None:
        """The visual tokens of all views before compression, without gradients."""
        return None if self.view_features is None else torch.cat(self.view_features)

    @property
    def grid(self) -> Grid:
        """The grid of its first view."""
        return self.layout.views[0]

    @property
    def prefix(self) -> int:
        """Tokens of each view before its grid."""
        return self.layout.prefix

    @property
    def views(self) -> list[ViewReport]:
        """What became of each view: its grid, and its part of the map."""
        layout, parts = self.layout, []
        for grid, start, end in zip(layout.views, layout.starts, layout.starts[1:], strict=False):
            token_map = self.token_map and self.token_map.of_inputs(torch.arange(start, end))
            parts.append(ViewReport(grid, layout.prefix, token_map))
        return parts

    @cached_property
    def detail_lost(self) -> float | None:
        """Share of the image's detail that the tokens left do not explain, 0 to 1 (see `detail.py`).

        `None` where that cannot be told: after a resampler, or where only a smaller image was encoded."""
        if self.view_features is None or self.token_map is None:
            return None
        layout = self.layout
        # All tokens of the image as one: first what lies on no grid, then the grids, view by view.
        numbers = torch.arange(layout.tokens)
        starts = zip(layout.starts, layout.starts[1:], strict=False)
        on_grid = torch.cat([numbers[start + layout.prefix : end] for start, end in starts])
        outside = numbers[~torch.isin(numbers, on_grid)]
        order = torch.cat([outside, on_grid])
        features = in_order(self.view_features, order)[None]
        tokens = VisualTokens(features, Grid(1, 1, len(on_grid)), prefix=len(outside))
        return float(detail_lost(tokens, self.token_map.of_inputs(order)))


@dataclass(frozen=True)
class ViewReport:
    """One view of an image: a base image, a tile, or the frames of a video."""

    grid: Grid
    prefix: int
    """Tokens before the grid."""
    token_map: TokenMap | None
    """Where the tokens of the view went, among all tokens left of the image; `None` after a resampler."""


@dataclass(frozen=True)
class CompressedImage:
    """The tokens of one image on their way to the LLM."""

    features: Float[Tensor, "features llm_dim"]
    """In the order in which the LLM gets them."""
    streams: tuple[Float[Tensor, "features stream_dim"], ...]
    """Further features of the same tokens, for later layers of the LLM."""
    slots: Int[Tensor, " placeholders_left"]
    """For each placeholder left its feature; `SEPARATOR` for a separator."""
    places: list[int]
    """For each placeholder left, which of the image's placeholders (0-based) gives it its position."""
    report: ImageReport
    left: Layout | None
    """Of the placeholders left, `None` where they lie on no grid any more."""

    def with_separators(self, separator: Float[Tensor, " llm_dim"] | None) -> CompressedImage:
        """Return the image with a feature for every placeholder left; later layers add nothing to separators."""
        if separator is None or bool((self.slots >= 0).all()):
            return self
        places = (self.slots >= 0).nonzero()[:, 0].to(self.features.device)
        whole = separator.to(self.features).expand(len(self.slots), -1).index_copy(0, places, self.features)
        streams = tuple(
            stream.new_zeros(len(self.slots), stream.shape[1]).index_copy(0, places, stream) for stream in self.streams
        )
        return replace(self, features=whole, streams=streams, slots=torch.arange(len(self.slots)))


@dataclass
class Stopwatch:
    """Adds up milliseconds by name; on a GPU with events, so that measuring never makes the device wait."""

    device: torch.device
    _spans: list[tuple[str, object, object]] = field(default_factory=list)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    def milliseconds(self) -> dict[str, float]:
        total: dict[str, float] = {}
        for name, start, end in self._spans:
            total[name] = total.get(name, 0.0) + self._between(start, end)
        return total

    def _now(self) -> object:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, start: object, end: object) -> float:
        if isinstance(start, float) and isinstance(end, float):
            return 1000 * (end - start)
        end.synchronize()  # type: ignore[attr-defined]
        return start.elapsed_time(end)  # type: ignore[attr-defined]


@dataclass(frozen=True, repr=False)
class Report:
    """What one call of the runtime did: every image in order of appearance, and where each position came from."""

    compressor: Compressor
    images: list[ImageReport]
    source: Int[Tensor, "batch new_length"] | None
    """For each position of the compressed prompt the position in the original one; -1: padding. `None`: no images."""
    stopwatch: Stopwatch
    packed: bool = False
    """Whether rows stand side by side, as they may in training; `source` is then of such packed rows."""
    positions: list[int] = field(default_factory=list)
    """How many of the LLM's positions each row of the prompt takes; `attach`ed models count them."""

    def __repr__(self) -> str:
        counts = ", ".join(f"{image.before} → {compact(image.by_layer)}" for image in self.images)
        return f"Report({self.compressor.name()}: {counts or 'no images'})"

    @property
    def before(self) -> int:
        """Visual tokens of all images without compression."""
        return sum(image.before for image in self.images)

    @property
    def after(self) -> int:
        """Visual tokens of all images that the LLM got."""
        return sum(image.after for image in self.images)

    def lined_up(
        self, predictions: Shaped[Tensor, "batch new_length *rest"], length: int, fill: float = -100
    ) -> Shaped[Tensor, "batch {length} *rest"]:
        """Logits of this call, or tokens chosen from them, as they would stand in the prompt of `length` tokens.

        Each is moved to just before the token that it predicts, so that `[:, :-1]` goes with the prompt's `[:, 1:]`;
        `fill` is where no token of an image was left, and in padding. Without images they stand there already.
        """
        if self.source is None:
            return predictions
        if self.packed:
            raise UserError("the rows of this call were packed; leave out pack_rows to line predictions up")
        if predictions.shape[:2] != self.source.shape:
            raise UserError("these predictions are not of the call that this report is about")
        if int(self.source.max()) >= length:
            raise UserError(f"the prompt of this call had more than {length} tokens")
        after = torch.nn.functional.pad(self.source[:, 1:], (0, 1), value=-1)
        place = torch.where(after >= 0, after - 1, self.source)  # nothing follows the last
        rows, columns = (self.source >= 0).nonzero(as_tuple=True)
        out = predictions.new_full((len(predictions), length, *predictions.shape[2:]), fill)
        out[rows, place[rows, columns].to(out.device)] = predictions[rows, columns]
        return out

    @property
    def by_layer(self) -> list[int]:
        """Visual tokens of all images at each layer of the LLM."""
        return [sum(counts) for counts in zip(*(image.by_layer for image in self.images), strict=True)]

    @property
    def retention(self) -> float:
        """Visual tokens over all layers of the LLM, as a share of what they would be without compression."""
        return sum(self.by_layer) / (self.before * len(self.by_layer)) if self.images else 1.0

    @property
    def milliseconds(self) -> dict[str, float]:
        """Time by stage: "encoder" (and projector, where one acts behind it), "selection", "projector" and others.

        "selection" is the method's own work: choosing, resizing pixels, or running a resampler.
        """
        return self.stopwatch.milliseconds()


def compact(counts: Iterable[int]) -> str:
    """Visual tokens by layer in few words: "64", or "576×2 → 64×30" for 576 in two layers and 64 in thirty."""
    runs = [(count, len(list(run))) for count, run in groupby(counts)]
    return str(runs[0][0]) if len(runs) == 1 else " → ".join(f"{count}×{layers}" for count, layers in runs)
