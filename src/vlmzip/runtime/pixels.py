"""Compressors that act on pixels: the encoder sees smaller images, and the LLM gets all that it puts out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from vlmzip.compressor import Compressor
from vlmzip.models.adapter import ModelAdapter
from vlmzip.runtime.report import CompressedImage, ImageReport, Stopwatch
from vlmzip.visual_tokens import Grid, Site, VisualTokens


def encode_smaller(
    adapter: ModelAdapter, inputs: Mapping[str, Any], compressor: Compressor, watch: Stopwatch
) -> tuple[list[CompressedImage], dict[str, Any]]:
    """The tokens of the smaller images, projected; and `inputs` with the smaller images in them."""
    grids = adapter.grids(inputs)
    with watch.time("selection"):
        smaller = {**inputs, **adapter.downsample(inputs, [compressor.smaller(grid) for grid in grids])}
    with watch.time("encoder"):
        groups = adapter.encode(smaller, Site.PRE_PROJECTOR, frozenset())
    found: dict[int, CompressedImage] = {}
    for tokens, indices in groups:
        for place, index in enumerate(indices):
            with watch.time("bookkeeping"):
                features, offsets, report = _account(adapter, compressor, tokens, place, grids[index])
            with watch.time("projector"):
                projected = adapter.project(features, Site.PRE_PROJECTOR)
            found[index] = CompressedImage(projected, offsets, report)
    return [found[index] for index in sorted(found)], smaller


def _account(
    adapter: ModelAdapter, compressor: Compressor, compressed: VisualTokens, place: int, grid: Grid
) -> tuple[Float[Tensor, "after dim"], list[int], ImageReport]:
    """The features of one smaller image, the placeholder that each gets its position from, and the report.

    The tokens that the whole image would have had do not exist: they are written down without features.
    """
    absent = compressed.features.new_zeros(1, compressed.prefix + grid.size, 0)
    whole = VisualTokens(absent, grid, compressed.prefix, passes_prefix=compressed.passes_prefix)
    token_map = compressor(whole)
    after = token_map.lengths[0]
    hidden = absent.shape[1] - whole.plain_count
    offsets = [anchor - hidden for anchor in token_map.anchor_index()[0].tolist()]
    report = ImageReport(
        row=-1,
        before=whole.plain_count,
        after=after,
        by_layer=(after,) * len(adapter.decoder_layers),
        token_map=token_map,
        grid=grid,
        prefix=compressed.prefix,
        features=None,
    )
    return compressed.features[place, -after:], offsets, report
