"""What a compressor may look at: the visual tokens of images that share one grid."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlmzip.sites import Signal as Signal
from vlmzip.sites import Site as Site


class Grid(NamedTuple):
    """How the visual tokens of one image lie: `frames` images of `rows` by `cols`, in raster order."""

    frames: int
    rows: int
    cols: int

    @property
    def size(self) -> int:
        """Number of visual tokens in the grid."""
        return self.frames * self.rows * self.cols


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of a batch of images of equal grid, at one site.

    What a compressor's `needs` did not ask for is `None`. `tokens` counts the prefix and the grid together.
    """

    features: Float[Tensor, "batch tokens dim"]
    grid: Grid | None
    """`None` after a map that leaves no grid; `prefix` is 0 then."""
    prefix: int = 0
    """Leading tokens outside the grid: 1 where the encoder has a CLS token that the family can pass on."""
    cls_attention: Float[Tensor, "batch tokens"] | None = None
    """Attention that each token gets from CLS, mean over heads; without CLS, attention received from all tokens."""
    keys: Float[Tensor, "batch tokens key_dim"] | None = None
    """Attention keys of the feature layer, mean over heads."""
    text_attention: Float[Tensor, "batch queries tokens"] | None = None
    """Attention of the question's tokens in the layer before `layer`, mean over heads. They are the text behind the
    image, up to the last question token: the one before the first label behind it, or the last of the prompt."""
    query_mask: Bool[Tensor, "batch queries"] | None = None
    """Which queries are there; rows are padded on the left, so that the last question token is the last in each."""
    text_features: Float[Tensor, "batch queries dim"] | None = None
    """The question's tokens as they entered the LLM."""
    llm_input: Float[Tensor, "batch entered dim"] | None = None
    """All of the image's tokens as they entered the LLM; comes with `text_features`."""
    pixels: Float[Tensor, "batch 3 height width"] | None = None
    """What the patches of the grid cover of the image that the encoder sees, in [0, 1]."""
    layer: int | None = None
    """The LLM layer about to run, for compressors inside the LLM."""
    passes_prefix: bool = False
    """Whether the model without compression gives the prefix to its LLM (LLaVA's "default" strategy does not)."""

    def __post_init__(self) -> None:
        tokens = self.features.shape[1]
        if self.grid is not None and self.prefix + self.grid.size != tokens:
            raise ValueError(f"{tokens} tokens do not fill prefix {self.prefix} + grid {tuple(self.grid)}")

    @property
    def plain_count(self) -> int:
        """Visual tokens per image that the LLM gets without compression."""
        return self.features.shape[1] - (0 if self.passes_prefix else self.prefix)

    def rows(self, index: Int[Tensor, " rows"]) -> VisualTokens:
        """The visual tokens of some images of the batch."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        chosen: dict[str, Any] = {name: value[index] for name, value in values.items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **chosen)
