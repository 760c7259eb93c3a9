"""The interface to a family of models, so that methods and runtime need no code for a single family."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmzip.compressor import Positions, Profile
from vlmzip.errors import UserError
from vlmzip.models.layout import Encoded, Layout, Pixels, Views, numbers_by_kind
from vlmzip.models.llm_attention import queries_and_keys
from vlmzip.processor import InputDict, Inputs
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens

#: Attention implementations for which transformers builds masks that keep packed rows from attending to each other.
MASKED_ATTENTION = ("sdpa", "eager")
#: LLMs for which we have checked that packed rows stay apart. Others ignore packing (gpt_oss) or carry a state along.
LLMS_THAT_MASK_PACKED_ROWS = ("llama", "mistral", "qwen2", "gemma2")


@dataclass(frozen=True)
class EncoderAttention:
    """The attention scores by which VisionZip ranks visual tokens, in every layer of a vision encoder."""

    by_view: Sequence[Float[Tensor, "layers _"]]
    """One tensor for each view of all images: a score for each token of its grid, mean over heads.

    The scores of a layer need not sum to 1.
    """
    whose: Sequence[str]
    """The attending tokens in each layer, in a few words, such as "CLS"."""
    scored: int
    """The 0-based layer whose scores VisionZip uses."""


@dataclass
class WithStreams(BaseModelOutputWithPooling):
    """The encoder output of models with deepstack: tokens, and the features that layers of the LLM add to them."""

    last_hidden_state: Any = None  # first, because accelerate rebuilds outputs from one dict
    pooler_output: Any = None
    """Projected tokens, one entry per image."""
    deepstack_features: list[list[Tensor]] | None = None
    """Features to add after each of the first layers of the LLM: a list per layer, one entry per image."""


class Family:
    """The interface between vlmzip and a family of vision-language models. It does not change the model.

    This class suffices for compressors after the projector and inside the LLM. It takes the tokens of an image from the
    model's own `get_image_features`. It treats each run of placeholders in the prompt as one image with one view, whose
    grid is a square if the tokens fill one. A subclass adds what the model's public methods do not provide: features
    before the projector and the signals that score them, images of several views, and positions with several axes.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    """The values of `config.model_type` that belong to the family."""
    example: ClassVar[str] = ""
    """A checkpoint of the family, shown by `vlmzip models`."""
    sites: ClassVar[tuple[Site, ...]] = (Site.POST_PROJECTOR, Site.IN_LLM)
    """Where compressors can act in this family."""
    image_inputs: tuple[str, ...] = ()
    """The model inputs that describe images. The first is present if there is an image.

    By default, the parameters of `get_image_features` whose names start with `pixel_` or `image_`.
    """
    default_positions: ClassVar[Positions] = "contiguous"
    """The value that stands for `positions=None`. VisionZip and DFMR use contiguous positions before LLaVA's LLM.

    Families whose positions have several axes set "original".
    """
    position_axes: ClassVar[tuple[int, ...]] = ()
    """Axes of `position_ids` before batch and length: (3,) if positions are temporal, height and width."""
    has_streams: ClassVar[bool] = False
    """True if layers of the LLM add further features to the visual tokens (deepstack)."""
    features_as_list: bool = True
    """True if the model takes a list of features, one entry per image; False if it takes one tensor for all images."""

    def __init__(self, model: nn.Module) -> None:
        # Adapters such as LoRA's wrap the model. The modules inside are those that run.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.model: Any = inner  # a type checker does not know the attributes of each family's model
        if not self.image_inputs:
            features: Any = inner.get_image_features
            arguments = inspect.signature(features).parameters
            self.image_inputs = tuple(name for name in arguments if name.startswith(("pixel_", "image_")))

    @property
    def placeholder_id(self) -> int:
        """The token id that stands for one visual token in `input_ids`.

        Override it if the config has no `image_token_id`.
        """
        token: int = self.model.config.image_token_id
        return token

    @property
    def llm(self) -> nn.Module:
        """The decoder, without vision encoder, projector and LM head.

        Override it if it is not `model.model.language_model`.
        """
        llm: nn.Module = self.model.model.language_model
        return llm

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder layers of the LLM, in order. Override it if they are not `llm.layers`."""
        return self.llm.layers  # type: ignore[return-value]

    @property
    def lora_targets(self) -> str:
        """A regular expression that matches the names of the LLM's linear layers, for low-rank adapters.

        Override it if the projections of attention and MLP have other names, such as `fc1`.
        """
        name = next(name for name, module in self.model.named_modules() if module is self.llm)
        return rf".*{name.rpartition('.')[2]}.*\.(q|k|v|o|qkv|gate|up|down|gate_up)_proj"

    @property
    def first_free_layer(self) -> int:
        """The first layer of the LLM, 0-based, before which tokens may be dropped.

        Override it if layers of the LLM add features to all visual tokens (deepstack): tokens stay until the last such
        layer has run.
        """
        return 1

    @property
    def vision_encoder(self) -> nn.Module:
        """The vision encoder. Override it if it is not `model.model.vision_tower`."""
        encoder: nn.Module = self.model.model.vision_tower
        return encoder

    @property
    def projector(self) -> nn.Module:
        """The module that turns the encoder's features into visual tokens of the LLM.

        Override it if it is not `model.model.multi_modal_projector`.
        """
        projector: nn.Module = self.model.model.multi_modal_projector
        return projector

    @property
    def llm_config(self) -> Any:
        """The config of the LLM."""
        return self.model.config.get_text_config()

    @property
    def keeps_packed_rows_apart(self) -> bool:
        """True if rows packed into one do not attend to each other, provided that each row's positions start at 0.

        It is False under FlashAttention, for which transformers keeps rows apart only in a batch of one. It is also
        False for positions with several axes, because they do not show where a row begins.
        """
        llm = self.llm_config
        masks = llm._attn_implementation in MASKED_ATTENTION and llm.model_type in LLMS_THAT_MASK_PACKED_ROWS
        return masks and not self.position_axes

    def profile(self) -> Profile:
        """Return the grid of one image at the model's own resolution and the number of layers of the LLM.

        Override it if images have several views, any size, or tokens that each cover several patches.
        """
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        return Profile(Grid(1, side, side), self.llm_config.num_hidden_layers, first_layer=self.first_free_layer)

    def prompt(self, question: str, images: int) -> str:
        """Return the text of a prompt about a number of images, for checkpoints without a chat template.

        Override it if the family was trained with a format of this kind, such as LLaVA's "USER: ... ASSISTANT:".
        """
        return "<image>" * images + question

    def encode(self, inputs: Inputs, site: Site, needs: frozenset[Signal]) -> Encoded:
        """Return the visual tokens of all images in `inputs` at `site`, with the signals in `needs`.

        Features are [views, tokens, dim], one batch for each grid, where dim is `feature_width(site)`. Each view holds
        all its tokens; `layouts` tells which of them the LLM sees. Override it to offer signals or sites before the
        projector: this method provides projected tokens without signals, and raises `UserError` if signals are needed
        at another site than after the projector.
        """
        if site is not Site.POST_PROJECTOR and needs:
            raise UserError(f"what the encoder of {type(self.model).__name__} attends to is not known yet")
        given = {name: inputs[name] for name in self.image_inputs if inputs.get(name) is not None}
        features = self.model.get_image_features(**given, return_dict=True).pooler_output
        self.features_as_list = not isinstance(features, Tensor)
        rows = torch.cat([one.flatten(0, -2) for one in features])
        grids = [layout.views[0] for layout in self.layouts(inputs)]
        images = rows.split([grid.size for grid in grids])
        return Encoded(
            [
                Views(VisualTokens(torch.stack([images[number] for number in numbers]), grid), numbers)
                for grid, numbers in numbers_by_kind(grids).items()
            ]
        )

    def encoder_attention(self, inputs: Inputs) -> EncoderAttention:
        """Return the scores by which VisionZip ranks visual tokens, for every layer of the encoder.

        The scores are [layers, tokens] for each view, in float32, from one run of the encoder. Override it if the
        encoder's queries and keys can be recorded. This method raises `UserError`.
        """
        raise UserError(f"{type(self).__name__} does not tell what its encoder attends to, layer by layer")

    def layouts(self, inputs: Inputs) -> list[Layout]:
        """Return the layout of each image in `inputs`, from shapes alone, without running the encoder.

        Override it if images have several views, separators, a prefix such as CLS, or grids that are not square.
        """
        counts = []
        for row in (inputs["input_ids"] == self.placeholder_id).long().cpu():
            edges = torch.nn.functional.pad(row, (1, 1)).diff().nonzero()[:, 0].view(-1, 2)
            counts += edges.diff(dim=1)[:, 0].tolist()
        return Layout.of_single_views([square_of(count) for count in counts])

    def plain_counts(self, inputs: Inputs) -> list[int]:
        """Return the number of placeholders of each image: the visual tokens that the LLM gets without compression."""
        return [layout.placeholders for layout in self.layouts(inputs)]

    def grids(self, inputs: Inputs) -> list[Grid]:
        """Return the grid of each view of all images in `inputs`."""
        return [grid for layout in self.layouts(inputs) for grid in layout.views]

    def view_pixels(self, inputs: Inputs) -> Pixels | None:
        """Return the normalised pixels of each view, [views, 3, height, width] or a list of [3, height, width].

        Override it if `pixel_values` is not such a batch. Return `None` if the inputs are patches.
        """
        pixels: Pixels = inputs["pixel_values"]
        return pixels

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        """Return image inputs with the views resized to `grids`, one grid per view. They are for `encode` only.

        Override it to support compressors at the site `pixels`; this method raises `UserError`. The families use
        antialiased bicubic interpolation in float32, as their processors do, so the result equals the smaller image
        that the processor would have made, except for rounding to 8 bits.
        """
        raise UserError(f"{type(self.model).__name__} cannot be shown smaller images")

    def choose_images(self, inputs: Inputs, chosen: list[int]) -> InputDict:
        """Return the image inputs of the images whose 0-based numbers are in `chosen`.

        Override it if an image input does not have one row per image.
        """
        return {name: inputs[name][chosen] for name in self.image_inputs if inputs.get(name) is not None}

    def feature_width(self, site: Site) -> int:
        """Return the number of features of a visual token at `site`.

        Override it if the encoder's features are wider than its hidden states, such as those of several layers.
        """
        config = self.llm_config if site is Site.POST_PROJECTOR else self.model.config.vision_config
        return int(config.hidden_size)

    def project(self, features: Float[Tensor, "tokens dim"], site: Site) -> Float[Tensor, "tokens llm_dim"]:
        """Return the inputs of the LLM, [tokens, llm_dim], for compressed tokens with their features at `site`.

        `features` has the tokens of all images, one after another. Override it to offer sites before the projector.
        This method returns the features unchanged.
        """
        return features

    def original_positions(
        self, inputs: Inputs, mask: Int[Tensor, "batch length"]
    ) -> tuple[Int[Tensor, "*axes batch length"], Int[Tensor, " batch"]]:
        """Return the positions of the uncompressed prompt, counted from 0, and the position of each row's next token.

        Positions are [batch, length], with `position_axes` before them if there are several axes; next positions are
        [batch]. `mask` is the attention mask, 0 for padding. Override it if positions have several axes.
        """
        return (mask.long().cumsum(-1) - 1).clamp(min=0), mask.sum(-1)

    def forward_positions(self, positions: Int[Tensor, "*axes batch length"]) -> Int[Tensor, "*axes batch length"]:
        """Return the `position_ids` that the model's `forward` takes for positions counted from 0.

        The shape does not change. Override it if `forward` counts from another number. `generate` always takes
        positions counted from 0.
        """
        return positions

    def encoder_outputs(
        self, features: list[Float[Tensor, "_ llm_dim"]], streams: Sequence[tuple[Tensor, ...]] = ()
    ) -> dict[str, BaseModelOutputWithPooling]:
        """Return `mm_encoder_outputs` for the model's `forward` and `generate`.

        `features` has the projected tokens of each image. `streams` has, for each image, the features that layers of
        the LLM add to the same tokens, one tensor per layer (deepstack). It is empty in families without deepstack.
        """
        # The model scatters a tensor over all placeholders at once, so one row can hold images of different lengths.
        form: Any = features if self.features_as_list else torch.cat(features)[None]
        if self.has_streams:
            by_layer = [list(layer) for layer in zip(*streams, strict=True)]
            return {"image": WithStreams(pooler_output=form, deepstack_features=by_layer)}
        return {"image": BaseModelOutputWithPooling(pooler_output=form)}

    def queries_and_keys(
        self,
        layer: nn.Module,
        hidden: Float[Tensor, "batch length dim"],
        positions: tuple[Float[Tensor, "_ length head_dim"], Float[Tensor, "_ length head_dim"]],
        rows: Int[Tensor, "batch queries"],
    ) -> tuple[Float[Tensor, "batch heads queries head_dim"], Float[Tensor, "batch key_heads length head_dim"]]:
        """Return the rotated queries of the tokens in `rows` and the rotated keys of all tokens in a decoder layer.

        `hidden` is the input of the layer; `positions` are the cosine and sine of the rotary embedding. Override it if
        the layer's attention is of a kind that `llm_attention` does not support.
        """
        return queries_and_keys(layer, hidden, positions, rows)


def square_of(tokens: int) -> Grid:
    """Return the square grid of this number of tokens, or a grid of one row if the number is not a square."""
    side = math.isqrt(tokens)
    return Grid(1, side, side) if side * side == tokens else Grid(1, 1, tokens)
