"""What a compressor may look at: the visual tokens of images that share one grid."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vlmzip.errors import UserError
from vlmzip.sites import Signal as Signal
from vlmzip.sites import Site as Site

#: What comes with a signal, and with which one.
COMES_WITH = {"query_mask": Signal.TEXT_ATTENTION, "llm_input": Signal.TEXT_FEATURES}


class Grid(NamedTuple):
    """How the visual tokens of one image lie: `frames` images of `rows` by `cols`, in raster order."""

    frames: int
    rows: int
    cols: int

    @property
    def size(self) -> int:
        """Number of visual tokens in the grid."""
        return self.frames * self.rows * self.cols


class VisualTokens:
    """The visual tokens of a batch of images of equal grid, at one site.

    A signal, such as `keys`, is there if the compressor's `needs` ask for it and the model gives it. Reading a signal
    that is not there raises `UserError`.
    """

    def __init__(
        self,
        features: Float[Tensor, "batch tokens dim"],
        grid: Grid | None,
        prefix: int = 0,
        *,
        layer: int | None = None,
        passes_prefix: bool = False,
        cls_attention: Float[Tensor, "batch tokens"] | None = None,
        keys: Float[Tensor, "batch tokens key_dim"] | None = None,
        text_attention: Float[Tensor, "batch queries tokens"] | None = None,
        query_mask: Bool[Tensor, "batch queries"] | None = None,
        text_features: Float[Tensor, "batch queries dim"] | None = None,
        llm_input: Float[Tensor, "batch entered dim"] | None = None,
        pixels: Float[Tensor, "batch 3 height width"] | None = None,
    ) -> None:
        self.features = features
        """Prefix and grid together."""
        self.grid = grid
        """`None` after a map that leaves no grid; `prefix` is 0 then."""
        self.prefix = prefix
        """Leading tokens outside the grid: 1 where the encoder has a CLS token that the family can pass on."""
        self.layer = layer
        """The LLM layer about to run, for compressors inside the LLM."""
        self.passes_prefix = passes_prefix
        """Whether the model without compression gives the prefix to its LLM (LLaVA's "default" strategy does not)."""
        signals = {
            "cls_attention": cls_attention,
            "keys": keys,
            "text_attention": text_attention,
            "query_mask": query_mask,
            "text_features": text_features,
            "llm_input": llm_input,
            "pixels": pixels,
        }
        self._signals = {name: value for name, value in signals.items() if value is not None}
        tokens = features.shape[1]
        if grid is not None and prefix + grid.size != tokens:
            raise ValueError(f"{tokens} tokens do not fill prefix {prefix} + grid {tuple(grid)}")

    # --- signals ----------------------------------------------------------------------------------------------

    @property
    def cls_attention(self) -> Float[Tensor, "batch tokens"]:
        """Attention that each token gets from CLS, mean over heads; without CLS, attention received from all tokens."""
        return self._signal("cls_attention")

    @property
    def keys(self) -> Float[Tensor, "batch tokens key_dim"]:
        """Attention keys of the feature layer, mean over heads."""
        return self._signal("keys")

    @property
    def text_attention(self) -> Float[Tensor, "batch queries tokens"]:
        """Attention of the question's tokens in the layer before `layer`, mean over heads.

        The question is the text behind the image, up to its last token: the one before the first label behind the
        image, or the last of the prompt.
        """
        return self._signal("text_attention")

    @property
    def query_mask(self) -> Bool[Tensor, "batch queries"]:
        """Which queries are there; rows are padded on the left, so that each ends with its last question token."""
        return self._signal("query_mask")

    @property
    def text_features(self) -> Float[Tensor, "batch queries dim"]:
        """The question's tokens as they entered the LLM."""
        return self._signal("text_features")

    @property
    def llm_input(self) -> Float[Tensor, "batch entered dim"]:
        """All of the image's tokens as they entered the LLM."""
        return self._signal("llm_input")

    @property
    def pixels(self) -> Float[Tensor, "batch 3 height width"]:
        """The part of the image that the grid's patches cover, as the encoder sees it, in [0, 1]."""
        return self._signal("pixels")

    @property
    def signals(self) -> frozenset[str]:
        """The names of the signals that are there."""
        return frozenset(self._signals)

    def _signal(self, name: str) -> Tensor:
        if name not in self._signals:
            signal = COMES_WITH.get(name, name)
            raise UserError(
                f"these visual tokens came without {name}: name Signal.{signal.upper()} in the method's `needs`, and"
                " use a model that gives it"
            )
        return self._signals[name]

    # --- counts and parts -------------------------------------------------------------------------------------

    @property
    def plain_count(self) -> int:
        """Visual tokens per image that the LLM gets without compression."""
        return self.features.shape[1] - (0 if self.passes_prefix else self.prefix)

    def replace(self, **changes: object) -> VisualTokens:
        """Return the same visual tokens with other values for some of the constructor's arguments."""
        names = ("features", "grid", "prefix", "layer", "passes_prefix")
        return VisualTokens(**{**{name: getattr(self, name) for name in names}, **self._signals, **changes})

    def window(self, rows: tuple[int, int], cols: tuple[int, int]) -> VisualTokens:
        """Return the tokens in some rows and columns of the grid (half-open ranges), and the prefix."""
        if self.grid is None:
            raise ValueError("tokens without a grid have no rows and columns")
        numbers = torch.arange(self.features.shape[1], device=self.features.device)
        inside = numbers[self.prefix :].view(tuple(self.grid))[:, slice(*rows), slice(*cols)]
        chosen = torch.cat([numbers[: self.prefix], inside.flatten()])
        by_token = self.signals & {"cls_attention", "keys"}
        changes: dict[str, object] = {name: self._signals[name][:, chosen] for name in by_token}
        if "pixels" in self.signals:
            height, width = self.pixels.shape[-2] // self.grid.rows, self.pixels.shape[-1] // self.grid.cols
            down, across = slice(rows[0] * height, rows[1] * height), slice(cols[0] * width, cols[1] * width)
            changes["pixels"] = self.pixels[..., down, across]
        changes["grid"] = Grid(self.grid.frames, *inside.shape[1:])
        return self.replace(features=self.features[:, chosen], **changes)

    def rows(self, index: Int[Tensor, " rows"]) -> VisualTokens:
        """Return the visual tokens of some images of the batch."""
        return self.replace(
            features=self.features[index], **{name: value[index] for name, value in self._signals.items()}
        )
