"""The questions that every family of models answers, so that methods and runtime never name one."""

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
from vlmzip.models.layout import Encoded, Layout, Pixels, Views
from vlmzip.models.llm_attention import queries_and_keys
from vlmzip.processor import InputDict, Inputs
from vlmzip.visual_tokens import Grid, Signal, Site, VisualTokens

#: Implementations of attention for which transformers makes masks, in which packed rows do not see each other.
MASKED_ATTENTION = ("sdpa", "eager")
#: LLMs that were seen to keep packed rows apart. Others never look for them (gpt_oss), or carry a state along.
LLMS_THAT_MASK_PACKED_ROWS = ("llama", "mistral", "qwen2", "gemma2")


@dataclass(frozen=True)
class EncoderAttention:
    """The attention that VisionZip ranks visual tokens by, in every layer of a vision encoder."""

    by_view: Sequence[Float[Tensor, "layers _"]]
    """For each view of all images: of each token of its grid, mean over heads. Rows need not sum to 1."""
    whose: Sequence[str]
    """For each layer, in a few words: who attends."""
    scored: int
    """The layer, 0-based, that VisionZip reads."""


@dataclass
class WithStreams(BaseModelOutputWithPooling):
    """What models with deepstack read: tokens, and what later layers of the LLM add to them."""

    last_hidden_state: Any = None  # accelerate makes outputs anew from one dictionary, which comes first
    pooler_output: Any = None
    """Projected tokens, an entry an image."""
    deepstack_features: list[list[Tensor]] | None = None
    """For each layer an entry an image."""


class Family:
    """What vlmzip has to know about a family of vision-language models; it changes nothing on the model.

    This class asks the model itself, and serves as it is behind the projector and inside the LLM: the tokens of an
    image are what `get_image_features` says. An image is a run of placeholders in the prompt; it counts as one view, a
    square if its tokens fill one. A family says what cannot be asked: the features before the projector and what in the
    encoder scores them, the views of an image, and positions of several axes.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    """The `config.model_type`s that it serves."""
    example: ClassVar[str] = ""
    """A checkpoint of the family, for the list of families."""
    sites: ClassVar[tuple[Site, ...]] = (Site.POST_PROJECTOR, Site.IN_LLM)
    """Where compressors can act in this family."""
    image_inputs: tuple[str, ...] = ()
    """The model inputs that describe images; the first is there whenever there is an image."""
    default_positions: ClassVar[Positions] = "contiguous"
    """What `positions=None` means: as VisionZip and DFMR do before LLaVA's LLM, unless positions have several axes."""
    position_axes: ClassVar[tuple[int, ...]] = ()
    """Axes of `position_ids` before batch and length: (3,) where positions are temporal, height and width."""
    has_streams: ClassVar[bool] = False
    """Whether layers of the LLM add further features to the visual tokens (deepstack)."""
    features_as_list: bool = True
    """Whether the model takes a list of features, one entry an image, or one tensor for all images."""

    def __init__(self, model: nn.Module) -> None:
        # Adapters such as LoRA's hold the model; the modules inside are the ones that run.
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self.model: Any = inner  # a family's own attributes are known to its own file, not to a type checker
        if not self.image_inputs:
            features: Any = inner.get_image_features
            arguments = inspect.signature(features).parameters
            self.image_inputs = tuple(name for name in arguments if name.startswith(("pixel_", "image_")))

    @property
    def placeholder_id(self) -> int:
        """The token id that stands for one visual token in `input_ids`."""
        token: int = self.model.config.image_token_id
        return token

    @property
    def llm(self) -> nn.Module:
        """The decoder, without vision encoder, projector and head."""
        llm: nn.Module = self.model.model.language_model
        return llm

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The layers of the LLM, in order."""
        return self.llm.layers  # type: ignore[return-value]

    @property
    def lora_targets(self) -> str:
        """A regular expression for the names of the LLM's linear layers, on which low-rank adapters go."""
        name = next(name for name, module in self.model.named_modules() if module is self.llm)
        return rf".*{name.rpartition('.')[2]}.*\.(q|k|v|o|qkv|gate|up|down|gate_up)_proj"

    @property
    def first_free_layer(self) -> int:
        """The first layer of the LLM before which tokens may go: no later one adds features to all of them."""
        return 1

    @property
    def vision_encoder(self) -> nn.Module:
        """What sees the pixels."""
        encoder: nn.Module = self.model.model.vision_tower
        return encoder

    @property
    def projector(self) -> nn.Module:
        """What makes the encoder's features into tokens of the LLM."""
        projector: nn.Module = self.model.model.multi_modal_projector
        return projector

    @property
    def llm_config(self) -> Any:
        """The config of the decoder."""
        return self.model.config.get_text_config()

    @property
    def keeps_packed_rows_apart(self) -> bool:
        """Whether rows that stand side by side in one do not see each other, if the positions of each count from 0.

        transformers masks them so, but under FlashAttention in a batch of one alone. Positions of several axes do not
        show where a row begins.
        """
        llm = self.llm_config
        masks = llm._attn_implementation in MASKED_ATTENTION and llm.model_type in LLMS_THAT_MASK_PACKED_ROWS
        return masks and not self.position_axes

    def profile(self) -> Profile:
        """The grid of one image at the model's own resolution, and the depth of its LLM."""
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        return Profile(Grid(1, side, side), self.llm_config.num_hidden_layers, first_layer=self.first_free_layer)

    def prompt(self, question: str, images: int) -> str:
        """The text of a prompt, for checkpoints without a chat template."""
        return "<image>" * images + question

    def encode(self, inputs: Inputs, site: Site, needs: frozenset[Signal]) -> Encoded:
        """The visual tokens of all images in `inputs`, as they are at `site`, with what `needs` asks for.

        Views of equal grid come together, each whole: what of them the LLM sees is what `layouts` say.
        """
        if site is not Site.POST_PROJECTOR and needs:
            raise UserError(f"what the encoder of {type(self.model).__name__} attends to is not known yet")
        given = {name: inputs[name] for name in self.image_inputs if inputs.get(name) is not None}
        features = self.model.get_image_features(**given, return_dict=True).pooler_output
        self.features_as_list = not isinstance(features, Tensor)
        rows = torch.cat([one.flatten(0, -2) for one in features])
        grids = [layout.views[0] for layout in self.layouts(inputs)]
        images = rows.split([grid.size for grid in grids])
        groups = []
        for grid in dict.fromkeys(grids):
            numbers = [number for number, own in enumerate(grids) if own == grid]
            groups.append(Views(VisualTokens(torch.stack([images[number] for number in numbers]), grid), numbers))
        return Encoded(groups)

    def encoder_attention(self, inputs: Inputs) -> EncoderAttention:
        """What VisionZip ranks visual tokens by, as it is in every layer of the encoder, from one run of it.

        Raises `UserError` for a family that does not tell.
        """
        raise UserError(f"{type(self).__name__} does not tell what its encoder attends to, layer by layer")

    def layouts(self, inputs: Inputs) -> list[Layout]:
        """Where each placeholder of each image in `inputs` comes from, from shapes alone."""
        counts = []
        for row in (inputs["input_ids"] == self.placeholder_id).long().cpu():
            edges = torch.nn.functional.pad(row, (1, 1)).diff().nonzero()[:, 0].view(-1, 2)
            counts += edges.diff(dim=1)[:, 0].tolist()
        return [Layout.of_one_view(square_of(count)) for count in counts]

    def plain_counts(self, inputs: Inputs) -> list[int]:
        """Placeholders of each image in `inputs`: the visual tokens that the LLM gets without compression."""
        return [layout.placeholders for layout in self.layouts(inputs)]

    def grids(self, inputs: Inputs) -> list[Grid]:
        """The grid of each view of all images in `inputs`."""
        return [grid for layout in self.layouts(inputs) for grid in layout.views]

    def view_pixels(self, inputs: Inputs) -> Pixels | None:
        """The pixels of each view as the encoder sees them, normalised; `None` where the inputs are patches."""
        pixels: Pixels = inputs["pixel_values"]
        return pixels

    def downsample(self, inputs: Inputs, grids: Sequence[Grid]) -> InputDict:
        """The image inputs of the same images with smaller views, one grid each; for `encode`, not for the model.

        Antialiased bicubic interpolation, in float32: what the processors of these families resize with, so that the
        result is the smaller image that they would have made, but for their rounding to 8 bits.
        """
        raise UserError(f"{type(self.model).__name__} cannot be shown smaller images")

    def choose_images(self, inputs: Inputs, chosen: list[int]) -> InputDict:
        """The image inputs of some of the images; one row an image, unless the family says otherwise."""
        return {name: inputs[name][chosen] for name in self.image_inputs if inputs.get(name) is not None}

    def feature_width(self, site: Site) -> int:
        """The width of the visual tokens at `site`."""
        config = self.llm_config if site is Site.POST_PROJECTOR else self.model.config.vision_config
        return int(config.hidden_size)

    def project(self, features: Float[Tensor, "tokens dim"], site: Site) -> Float[Tensor, "tokens llm_dim"]:
        """What the LLM gets for tokens that left `site`."""
        return features

    def original_positions(
        self, inputs: Inputs, mask: Int[Tensor, "batch length"]
    ) -> tuple[Int[Tensor, "*axes batch length"], Int[Tensor, " batch"]]:
        """The positions of the uncompressed prompt, counted from 0, and the position of each row's next token."""
        return (mask.long().cumsum(-1) - 1).clamp(min=0), mask.sum(-1)

    def forward_positions(self, positions: Int[Tensor, "*axes batch length"]) -> Int[Tensor, "*axes batch length"]:
        """What the model's `forward` wants for positions counted from 0; `generate` always takes those."""
        return positions

    def encoder_outputs(
        self, features: list[Float[Tensor, "_ llm_dim"]], streams: Sequence[tuple[Tensor, ...]] = ()
    ) -> dict[str, BaseModelOutputWithPooling]:
        """`mm_encoder_outputs` for the model's `forward` and `generate`: projected tokens, one entry an image.

        `streams` has for each image the features of the same tokens that later layers of the LLM get.
        """
        # A tensor is scattered over the placeholders as a whole: one row can hold images of different lengths.
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
        """Rotated queries of the tokens in `rows` and rotated keys of all, as a decoder layer's attention has them."""
        return queries_and_keys(layer, hidden, positions, rows)


def square_of(tokens: int) -> Grid:
    """Return the square grid that holds so many tokens; tokens that fill no square lie in one row."""
    side = math.isqrt(tokens)
    return Grid(1, side, side) if side * side == tokens else Grid(1, 1, tokens)
