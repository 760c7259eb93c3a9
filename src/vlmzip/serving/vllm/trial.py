"""A trial of a setting before the engine gets it: an error in the engine's process would end it for all requests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models.family import EncoderLayers, Family, no_layers
from vlmzip.models.layout import Encoded, Layout, Views, numbers_by_kind
from vlmzip.processor import Inputs
from vlmzip.runtime.report import Stopwatch
from vlmzip.runtime.stages import compress_images
from vlmzip.serving.vllm import setting
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens

#: The width of the random features, the number of layers of the encoder, and the pixels per side of a token.
WIDTH, DEPTH, PATCH = 8, 24, 2
#: The most rows and columns of a view in a trial.
MOST_SIDE = 32


class RandomFeatures(Family):
    """A family whose encoder returns random features for an image of a known layout."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.modality = "video" if layout.is_video else "image"

    def layouts(self, inputs: Inputs) -> list[Layout]:
        return [self.layout]

    @property
    def decoder_layers(self) -> Sequence[object]:  # type: ignore[override]
        return range(1)

    def project(self, features: Tensor, site: Site) -> Tensor:
        return features

    def encode(
        self, inputs: Inputs, site: Site, needs: frozenset[Signal], encoder_layers: EncoderLayers = no_layers
    ) -> Encoded:
        rng = torch.Generator().manual_seed(0)
        layers = len(encoder_layers(DEPTH)) + 1
        groups = []
        for grid, numbers in numbers_by_kind(self.layout.views).items():
            shape = (len(numbers), self.layout.prefix + grid.size)
            features = torch.randn(*shape, WIDTH, generator=rng)
            tokens = VisualTokens(
                features, grid, self.layout.prefix, passes_prefix=self.layout.passes_prefix, projector=lambda x: x
            )
            values = {
                signal.value: _random(signal, shape, layers, grid, rng) for signal in sorted(needs - {Signal.PROJECTOR})
            }
            groups.append(Views(tokens.replace(**values), numbers))
        return Encoded(groups, torch.zeros(WIDTH))


def _random(signal: Signal, shape: tuple[int, int], layers: int, grid: Grid, rng: torch.Generator) -> Tensor:
    """Return random values of the shape that a signal has."""
    if signal is Signal.PIXELS:
        return torch.rand(shape[0], 3, grid.rows * PATCH, grid.cols * PATCH, generator=rng)
    if signal in (Signal.CLS_ATTENTION, Signal.LAST_CLS_ATTENTION):
        return torch.rand(*shape, generator=rng)
    return torch.rand(*shape, layers if signal is Signal.ATTENTION_RECEIVED else WIDTH, generator=rng)


def for_trial(layout: Layout) -> Layout:
    """Return the layout with smaller views if they are large: some methods take long for many tokens."""
    first = layout.views[0]
    small = Grid(first.frames, min(first.rows, MOST_SIDE), min(first.cols, MOST_SIDE))
    if small == first or layout.separators or not layout.is_seen_whole:
        return layout
    if layout.is_video:
        return Layout.of_frames(small, len(layout.views), layout.prefix, passes_prefix=layout.passes_prefix)
    if len(layout.views) == 1:
        return Layout.of_one_view(small, layout.prefix, passes_prefix=layout.passes_prefix)
    return layout


@torch.inference_mode()
def try_out(compressor: Compressor, layout: Layout) -> None:
    """Compress random features of an image of this layout.

    Raise `UserError` if the compressor cannot act on it, or leaves another number of tokens than shapes tell.
    """
    (expected,) = setting.counts([layout], compressor)
    family = RandomFeatures(layout)
    (image,), _ = compress_images(family, {}, compressor, Stopwatch(torch.device("cpu")), None)
    if (left := len(image.features)) != expected:
        raise UserError(
            f"{compressor.name()} leaves {left} tokens of an image of {layout.placeholders}, and its token_count says"
            f" {expected}: a method that counts by content returns None there"
        )
