"""The visual tokens that a compressor works on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from vlmzip.errors import UserError
from vlmzip.sites import Signal as Signal
from vlmzip.sites import Site as Site

#: Attributes that come with a signal of another name, and that signal.
COMES_WITH = {
    "query_mask": Signal.TEXT_ATTENTION, "llm_input": Signal.TEXT_FEATURES, "text_keys": Signal.LLM_KEYS,
    "text_states": Signal.LLM_STATES,
}  # fmt: skip

#: Signals of the vision encoder with one value, or one vector, for each token of a view.
BY_TOKEN = {
    "cls_attention", "keys", "attention_received", "last_cls_attention", "last_keys", "encoder_features",
}  # fmt: skip


#: A function from features before the projector, [..., encoder_dim], to projected tokens, [..., llm_dim].
Projector: TypeAlias = Callable[[Float[Tensor, "*any encoder_dim"]], Float[Tensor, "*any llm_dim"]]


class Grid(NamedTuple):
    """The layout of an image's visual tokens: `frames` grids of `rows` x `cols` tokens, in raster order."""

    frames: int
    rows: int
    cols: int

    @property
    def size(self) -> int:
        """Return the number of visual tokens in the grid."""
        return self.frames * self.rows * self.cols


class VisualTokens:
    """The visual tokens of a batch of images with equal grids, at one site.

    A signal, such as `keys`, is available if it is in the compressor's `needs` and the model provides it. Reading a
    missing signal raises `UserError`.
    """

    def __init__(
        self,
        features: Float[Tensor, "batch tokens dim"],
        grid: Grid | None,
        prefix: int = 0,
        *,
        layer: int | None = None,
        passes_prefix: bool = False,
        projector: Projector | None = None,
        cls_attention: Float[Tensor, "batch tokens"] | None = None,
        keys: Float[Tensor, "batch tokens key_dim"] | None = None,
        attention_received: Float[Tensor, "batch tokens layers"] | None = None,
        last_cls_attention: Float[Tensor, "batch tokens"] | None = None,
        last_keys: Float[Tensor, "batch tokens wide_key_dim"] | None = None,
        encoder_features: Float[Tensor, "batch tokens encoder_dim"] | None = None,
        text_attention: Float[Tensor, "batch queries tokens"] | None = None,
        candidate_attention: Float[Tensor, "batch queries outputs"] | None = None,
        query_mask: Bool[Tensor, "batch queries"] | None = None,
        text_features: Float[Tensor, "batch queries llm_dim"] | None = None,
        llm_input: Float[Tensor, "batch entered llm_dim"] | None = None,
        llm_keys: Float[Tensor, "batch tokens llm_key_dim"] | None = None,
        text_keys: Float[Tensor, "batch queries llm_key_dim"] | None = None,
        llm_states: Float[Tensor, "batch tokens llm_dim"] | None = None,
        text_states: Float[Tensor, "batch queries llm_dim"] | None = None,
        pixels: Float[Tensor, "batch 3 height width"] | None = None,
    ) -> None:
        self.features = features
        """Features of the prefix, followed by those of the grid."""
        self.grid = grid
        """The grid. `None` after a token map that leaves no grid; `prefix` is then 0."""
        self.prefix = prefix
        """Number of leading tokens outside the grid: 1 if the encoder has a CLS token that the LLM could get."""
        self.layer = layer
        """The LLM layer that runs next, for compressors inside the LLM."""
        self.passes_prefix = passes_prefix
        """Whether the LLM gets the prefix without compression (not with LLaVA's "default" strategy)."""
        self._projector = projector
        signals = {
            "cls_attention": cls_attention,
            "keys": keys,
            "attention_received": attention_received,
            "last_cls_attention": last_cls_attention,
            "last_keys": last_keys,
            "encoder_features": encoder_features,
            "text_attention": text_attention,
            "candidate_attention": candidate_attention,
            "query_mask": query_mask,
            "text_features": text_features,
            "llm_input": llm_input,
            "llm_keys": llm_keys,
            "text_keys": text_keys,
            "llm_states": llm_states,
            "text_states": text_states,
            "pixels": pixels,
        }
        self._signals = {name: value for name, value in signals.items() if value is not None}
        tokens = features.shape[1]
        if grid is not None and prefix + grid.size != tokens:
            raise ValueError(f"{tokens} tokens do not fill prefix {prefix} + grid {tuple(grid)}")

    # --- signals ----------------------------------------------------------------------------------------------

    @property
    def cls_attention(self) -> Float[Tensor, "batch tokens"]:
        """Attention from CLS to each token, mean over heads. Without CLS: attention received from all tokens."""
        return self._signal("cls_attention")

    @property
    def keys(self) -> Float[Tensor, "batch tokens key_dim"]:
        """Attention keys of the encoder layer that gives the features, mean over heads."""
        return self._signal("keys")

    @property
    def attention_received(self) -> Float[Tensor, "batch tokens layers"]:
        """Attention that each token receives from all tokens of its view, mean over heads and attending tokens.

        The layers are those of `Compressor.encoder_layers`, followed by the layer that gives the features.
        """
        return self._signal("attention_received")

    @property
    def last_cls_attention(self) -> Float[Tensor, "batch tokens"]:
        """`cls_attention` in the last layer of the encoder, with all heads joined to one of the layer's full width."""
        return self._signal("last_cls_attention")

    @property
    def last_keys(self) -> Float[Tensor, "batch tokens wide_key_dim"]:
        """Attention keys of the last layer of the encoder, with the heads joined."""
        return self._signal("last_keys")

    @property
    def encoder_features(self) -> Float[Tensor, "batch tokens encoder_dim"]:
        """Features before the projector, for compressors behind it.

        If the projector joins patches, no features before it belong to one token. These are then the projected tokens.
        """
        return self._signal("encoder_features")

    @property
    def projector(self) -> Projector:
        """The model's projector: it takes features before it, [..., encoder_dim], and returns [..., llm_dim]."""
        if self._projector is None:
            raise _missing("projector")
        return self._projector

    @property
    def text_attention(self) -> Float[Tensor, "batch queries tokens"]:
        """Attention of the question's tokens to the visual tokens in the layer before `layer`, mean over heads.

        For a method with `asks_next_layer`, it is the attention in `layer`.

        The question is the text after the image. It ends at the token before the first label after the image, or at the
        last token of the prompt if there are no labels.
        """
        return self._signal("text_attention")

    @property
    def candidate_attention(self) -> Float[Tensor, "batch queries outputs"]:
        """Attention of the question's tokens to the output tokens of `Compressor.candidates` in layer `layer`.

        It is the mean over heads. The softmax is over these output tokens alone, without the rest of the prompt.
        """
        return self._signal("candidate_attention")

    @property
    def query_mask(self) -> Bool[Tensor, "batch queries"]:
        """True for the question's tokens. Rows are padded on the left and end with the last question token."""
        return self._signal("query_mask")

    @property
    def text_features(self) -> Float[Tensor, "batch queries llm_dim"]:
        """Features of the question's tokens at the input of the LLM."""
        return self._signal("text_features")

    @property
    def llm_input(self) -> Float[Tensor, "batch entered llm_dim"]:
        """Features of all tokens of the image at the input of the LLM."""
        return self._signal("llm_input")

    @property
    def llm_keys(self) -> Float[Tensor, "batch tokens llm_key_dim"]:
        """Attention keys of the visual tokens in the LLM layer before `layer`, rotated, with the heads joined."""
        return self._signal("llm_keys")

    @property
    def text_keys(self) -> Float[Tensor, "batch queries llm_key_dim"]:
        """The same keys of the question's tokens."""
        return self._signal("text_keys")

    @property
    def llm_states(self) -> Float[Tensor, "batch tokens llm_dim"]:
        """Hidden states of the visual tokens that enter `layer`, after the LLM's final norm."""
        return self._signal("llm_states")

    @property
    def text_states(self) -> Float[Tensor, "batch queries llm_dim"]:
        """The same states of the question's tokens."""
        return self._signal("text_states")

    @property
    def pixels(self) -> Float[Tensor, "batch 3 height width"]:
        """Pixels in [0, 1] of the image that the encoder sees, cut to the area of the grid's patches."""
        return self._signal("pixels")

    @property
    def signals(self) -> frozenset[str]:
        """Return the names of the available signals."""
        return frozenset(self._signals)

    def _signal(self, name: str) -> Tensor:
        if name not in self._signals:
            raise _missing(name)
        return self._signals[name]

    # --- counts and parts -------------------------------------------------------------------------------------

    @property
    def plain_count(self) -> int:
        """Return the number of visual tokens per image that the LLM gets without compression."""
        return self.features.shape[1] - (0 if self.passes_prefix else self.prefix)

    def replace(self, **changes: object) -> VisualTokens:
        """Return the same visual tokens with other values for some of the constructor's arguments."""
        names = ("features", "grid", "prefix", "layer", "passes_prefix")
        same = {name: getattr(self, name) for name in names}
        return VisualTokens(**{**same, "projector": self._projector, **self._signals, **changes})

    def window(self, rows: tuple[int, int], cols: tuple[int, int]) -> VisualTokens:
        """Return the tokens in some rows and columns of the grid (half-open ranges), and the prefix."""
        if self.grid is None:
            raise ValueError("tokens without a grid have no rows and columns")
        numbers = torch.arange(self.features.shape[1], device=self.features.device)
        inside = numbers[self.prefix :].view(tuple(self.grid))[:, slice(*rows), slice(*cols)]
        chosen = torch.cat([numbers[: self.prefix], inside.flatten()])
        changes: dict[str, object] = {name: self._signals[name][:, chosen] for name in self.signals & BY_TOKEN}
        if "pixels" in self.signals:
            height, width = self.pixels.shape[-2] // self.grid.rows, self.pixels.shape[-1] // self.grid.cols
            down, across = slice(rows[0] * height, rows[1] * height), slice(cols[0] * width, cols[1] * width)
            changes["pixels"] = self.pixels[..., down, across]
        changes["grid"] = Grid(self.grid.frames, *inside.shape[1:])
        return self.replace(features=self.features[:, chosen], **changes)

    def clips(self, frames: Int[Tensor, "clips frames"]) -> VisualTokens:
        """Return the tokens of videos as one view each; `frames` has the rows of each video's frames.

        The prefixes of all frames come first. Of the signals, those with one value per token remain.
        """
        if self.grid is None:
            raise UserError(
                "these tokens no longer lie on the grids of frames: put a method that compares frames before the method"
                " that leaves no grid"
            )
        count = frames.shape[1]
        by_token = {name: frames_joined(self._signals[name][frames], self.prefix) for name in self.signals & BY_TOKEN}
        return VisualTokens(
            frames_joined(self.features[frames], self.prefix),
            Grid(count * self.grid.frames, self.grid.rows, self.grid.cols),
            count * self.prefix,
            layer=self.layer,
            passes_prefix=self.passes_prefix,
            projector=self._projector,
            **by_token,
        )

    def rows(self, index: Int[Tensor, " rows"]) -> VisualTokens:
        """Return the visual tokens of some images of the batch."""
        return self.replace(
            features=self.features[index], **{name: value[index] for name, value in self._signals.items()}
        )


def _missing(name: str) -> UserError:
    signal = COMES_WITH.get(name, name)
    return UserError(
        f"these visual tokens came without {name}: name Signal.{signal.upper()} in the method's `needs`, and"
        " use a model that gives it"
    )


def frames_joined(
    values: Shaped[Tensor, "clips frames tokens *rest"], prefix: int
) -> Shaped[Tensor, "clips all *rest"]:
    """Return values of the tokens of several frames as those of one clip: first all prefixes, then all grids."""
    return torch.cat([values[:, :, :prefix].flatten(1, 2), values[:, :, prefix:].flatten(1, 2)], 1)
