"""A report on the images of one call: token counts, token maps and times. Also the last report of each façade."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby, pairwise
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models.family import Modality
from vlmzip.models.layout import Layout
from vlmzip.runtime.compress import in_order
from vlmzip.runtime.detail import detail_lost
from vlmzip.token_map import TokenMap
from vlmzip.visual_tokens import Grid, VisualTokens


@dataclass(frozen=True)
class ImageReport:
    """The report on one image or video: its row in the batch, and the fate of its visual tokens."""

    row: int
    before: int
    """Visual tokens that the LLM would get without compression."""
    after: int
    """Visual tokens that enter the LLM. Compressors inside the LLM may reduce them further, see `by_layer`."""
    by_layer: tuple[int, ...]
    """Visual tokens at each layer of the LLM."""
    token_map: TokenMap | None
    """The map of this image (a batch of 1), from the tokens of all its views to those of the last layer.

    `None` after a resampler, because each of its tokens comes from the whole image."""
    layout: Layout
    """The layout of the image's views: the input tokens of the map, and the separators that follow them."""
    view_features: tuple[Float[Tensor, "_ dim"], ...] | None
    """The visual tokens of each view before compression, without gradients; `detail_lost` needs them.

    `None` if there is nothing to compare: only a smaller image or a part of it was encoded, or the tokens were
    resampled."""
    modality: Modality = "image"
    """"video" if this is the report on a video, whose views are its frames."""

    @property
    def features(self) -> Float[Tensor, "tokens dim"] | None:
        """Return the visual tokens of all views before compression, without gradients."""
        return None if self.view_features is None else torch.cat(self.view_features)

    @property
    def grid(self) -> Grid:
        """Return the grid of the first view."""
        return self.layout.views[0]

    @property
    def prefix(self) -> int:
        """Return the number of tokens before the grid of each view."""
        return self.layout.prefix

    @property
    def views(self) -> list[ViewReport]:
        """Return a report on each view: its grid, and its part of the map."""
        layout, parts = self.layout, []
        for grid, (start, end) in zip(layout.views, pairwise(layout.starts), strict=True):
            token_map = self.token_map and self.token_map.of_inputs(torch.arange(start, end))
            parts.append(ViewReport(grid, layout.prefix, token_map))
        return parts

    @property
    def frames(self) -> list[ViewReport]:
        """Return a report on each view. A view of all frames of a video is divided into its frames."""
        parts = []
        for grid, start in zip(self.layout.views, self.layout.starts, strict=False):
            size, prefix = grid.rows * grid.cols, self.layout.prefix // grid.frames
            for frame in range(grid.frames):
                before = start + frame * prefix + torch.arange(prefix)
                on_grid = start + self.layout.prefix + frame * size + torch.arange(size)
                token_map = self.token_map and self.token_map.of_inputs(torch.cat([before, on_grid]))
                parts.append(ViewReport(Grid(1, grid.rows, grid.cols), prefix, token_map))
        return parts

    @cached_property
    def detail_lost(self) -> float | None:
        """Return the share of the image's detail that the remaining tokens do not explain, 0 to 1 (see `detail.py`).

        Return `None` if it is unknown: after a resampler, or if only a smaller image or a part of it was encoded."""
        if self.view_features is None or self.token_map is None:
            return None
        layout = self.layout
        # Treat all tokens of the image as one view: first the tokens outside the grids, then the grids, view by view.
        numbers = torch.arange(layout.tokens)
        on_grid = torch.cat([numbers[start + layout.prefix : end] for start, end in pairwise(layout.starts)])
        outside = numbers[~torch.isin(numbers, on_grid)]
        order = torch.cat([outside, on_grid])
        features = in_order(self.view_features, order)[None]
        tokens = VisualTokens(features, Grid(1, 1, len(on_grid)), prefix=len(outside))
        return float(detail_lost(tokens, self.token_map.of_inputs(order)))


@dataclass(frozen=True)
class ViewReport:
    """One view: a base image, a tile, a frame of a video, or all frames for a method that sees the whole clip."""

    grid: Grid
    prefix: int
    """The number of tokens before the grid."""
    token_map: TokenMap | None
    """The map from the tokens of the view to the remaining tokens of the image; `None` after a resampler."""


@dataclass(frozen=True)
class CompressedImage:
    """The tokens of one image on their way to the LLM."""

    features: Float[Tensor, "features llm_dim"]
    """The features, in the order in which the LLM gets them."""
    streams: tuple[Float[Tensor, "features stream_dim"], ...]
    """Further features of the same tokens, for later layers of the LLM."""
    slots: Int[Tensor, " placeholders_left"]
    """The index into `features` for each remaining placeholder; `SEPARATOR` for a separator."""
    places: list[int]
    """The 0-based index, for each remaining placeholder, of the image's placeholder whose position it takes."""
    report: ImageReport
    left: Layout | None
    """The layout of the remaining placeholders; `None` if they no longer form grids."""
    further: Mapping[str, object]
    """What the model's `forward` reads beside the tokens of all images, from the run that encoded them."""

    def with_separators(self, separator: Float[Tensor, " llm_dim"] | None) -> CompressedImage:
        """Return the image with a feature for every remaining placeholder; the `streams` of separators are 0."""
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
    """A stopwatch that adds up milliseconds by name. On a GPU it records events, which do not block the device."""

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
    """The report on one call: every image and video in order of appearance, and the origin of every position."""

    compressor: Compressor
    images: list[ImageReport]
    source: Int[Tensor, "batch new_length"] | None
    """The original column of each token of the compressed prompt; -1 for padding. `None` without images."""
    stopwatch: Stopwatch
    packed: bool = False
    """True if rows were packed for training; `source` then describes the packed rows."""
    too_long: list[int] = field(default_factory=list)
    """The rows that lost their labels in training, because they are too long after compression."""
    positions: list[int] = field(default_factory=list)
    """The number of the LLM's positions that each row of the prompt takes; models from `attach` fill it in."""

    def __repr__(self) -> str:
        counts = ", ".join(f"{image.before} → {compact(image.by_layer)}" for image in self.images)
        return f"Report({self.compressor.name()}: {counts or 'no images'})"

    @property
    def before(self) -> int:
        """Return the number of visual tokens of all images without compression."""
        return sum(image.before for image in self.images)

    @property
    def after(self) -> int:
        """Return the number of visual tokens of all images that entered the LLM."""
        return sum(image.after for image in self.images)

    @property
    def average(self) -> float:
        """Return the mean number of visual tokens per image that entered the LLM; 0 without images."""
        return self.after / len(self.images) if self.images else 0.0

    def lined_up(
        self, predictions: Shaped[Tensor, "batch new_length *rest"], length: int, fill: float = -100
    ) -> Shaped[Tensor, "batch {length} *rest"]:
        """Return this call's predictions (logits, or tokens chosen from them) aligned to the original prompt.

        The original prompt has `length` tokens. Each prediction moves to the column just before the token that it
        predicts, so that `[:, :-1]` of the result matches `[:, 1:]` of the prompt. All other columns get `fill`.
        Without images the predictions are already aligned. Raise `UserError` if rows were packed, or if `predictions`
        or `length` do not fit this call.
        """
        if self.source is None:
            return predictions
        if self.packed:
            raise UserError("the rows of this call were packed; leave out pack_rows to line predictions up")
        if predictions.shape[:2] != self.source.shape:
            shapes = list(self.source.shape), list(predictions.shape[:2])
            raise UserError(f"predictions must be {shapes[0]}, as in the call of this report, got {shapes[1]}")
        if int(self.source.max()) >= length:
            raise UserError(f"the prompt of this call had more than {length} tokens")
        after = torch.nn.functional.pad(self.source[:, 1:], (0, 1), value=-1)
        place = torch.where(after >= 0, after - 1, self.source)  # the last token has no next token
        rows, columns = (self.source >= 0).nonzero(as_tuple=True)
        out = predictions.new_full((len(predictions), length, *predictions.shape[2:]), fill)
        out[rows, place[rows, columns].to(out.device)] = predictions[rows, columns]
        return out

    @property
    def by_layer(self) -> list[int]:
        """Return the number of visual tokens of all images at each layer of the LLM."""
        return [sum(counts) for counts in zip(*(image.by_layer for image in self.images), strict=True)]

    @property
    def retention(self) -> float:
        """Return the visual tokens summed over all layers of the LLM, as a share of the sum without compression."""
        return sum(self.by_layer) / (self.before * len(self.by_layer)) if self.images else 1.0

    @property
    def milliseconds(self) -> dict[str, float]:
        """Return the time of each stage in milliseconds: "encoder", "selection", "projector" and others.

        "encoder" includes the projector if the method acts after it. "selection" is the work of the method: selecting
        tokens, resizing pixels, or running a resampler.
        """
        return self.stopwatch.milliseconds()


def compact(counts: Iterable[int]) -> str:
    """Return the visual tokens by layer as short text: "64", or "576×2 → 64×30" for 576 in 2 layers, then 64 in 30."""
    runs = [(count, len(list(run))) for count, run in groupby(counts)]
    return str(runs[0][0]) if len(runs) == 1 else " → ".join(f"{count}×{layers}" for count, layers in runs)


# --- the last report of each façade ----------------------------------------------------------------------------------

_in_this_thread = threading.local()
_in_any_thread: WeakKeyDictionary[nn.Module, Report] = WeakKeyDictionary()


def publish(facade: nn.Module, report: Report) -> None:
    """Store `report` as the last report of `facade`, in this thread and in any thread."""
    _reports()[facade] = _in_any_thread[facade] = report


def last_report(facade: nn.Module) -> Report:
    """Return the last report of `facade` in this thread, or in any thread if this one has not called it.

    Raise `UserError` before the first call.
    """
    report = _reports().get(facade) or _in_any_thread.get(facade)
    if report is None:
        raise UserError("there is no report yet; call the model first")
    return report


def _reports() -> WeakKeyDictionary[nn.Module, Report]:
    if not hasattr(_in_this_thread, "reports"):
        _in_this_thread.reports = WeakKeyDictionary()
    return _in_this_thread.reports
