"""Models of published dimensions with random weights, for speed and memory. They need no download."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from vlmzip.errors import UserError
from vlmzip.keep import round_half_up
from vlmzip.visual_tokens import Grid

#: The models of all presets.
Model: TypeAlias = LlavaForConditionalGeneration | Qwen2_5_VLForConditionalGeneration
#: Width of an attention head in the LLM of every preset.
LLM_HEAD = 128
#: Tokens of text are drawn from here: no preset has a special token among them.
TEXT = (3, 32_000)


@dataclass(frozen=True, kw_only=True)
class Preset(ABC):
    """Dimensions of a model, and the images or the video of a prompt."""

    images: int
    """Views per prompt. Tiles count as images, and so does each frame that the encoder makes tokens of."""
    grid: Grid
    """The visual tokens of each view."""
    layers: int
    heads: int
    mlp: int
    key_value_heads: int | None = None
    """Heads of keys and values in the LLM; `None` for as many as `heads`."""
    vision_layers: int
    vision_heads: int
    vision_mlp: int

    vision_head: ClassVar[int]
    """Width of an attention head in the vision encoder."""

    @property
    @abstractmethod
    def placeholder(self) -> int:
        """Return the token id that stands for one visual token."""

    @abstractmethod
    def config(self, text_tokens: int = 64, new_tokens: int = 16) -> PreTrainedConfig:
        """Return the config of the model, with positions for such a prompt and answer."""

    @abstractmethod
    def visual_inputs(self, ids: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """Return the model inputs that describe the images or videos of prompts, [batch, length]. Pixels are noise."""

    @property
    def visual_tokens(self) -> int:
        """Return the number of visual tokens in a prompt."""
        return self.images * self.grid.size

    @property
    def width(self) -> int:
        return self.heads * LLM_HEAD

    @property
    def vision_width(self) -> int:
        return self.vision_heads * self.vision_head

    def scaled(self, scale: float) -> Preset:
        """Return a narrower preset: attention heads and MLP widths times `scale`, rounded, at least one head.

        Layers, head size, vocabulary, images and tokens stay, so that token profiles equal the published ones.
        """
        if not 0 < scale <= 1:
            raise UserError(f"scale {scale:g}: give a number above 0 and up to 1")
        names = ["heads", "mlp", "vision_heads", "vision_mlp"]
        sizes: dict[str, Any] = {name: max(1, round_half_up(getattr(self, name) * scale)) for name in names}
        if self.key_value_heads is not None:
            most = max(1, round_half_up(self.key_value_heads * scale))
            sizes["key_value_heads"] = next(n for n in range(most, 0, -1) if sizes["heads"] % n == 0)
        return dataclasses.replace(self, **sizes)

    def inputs(self, batch: int, text_tokens: int, device: str | torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return a batch of prompts: half of the text, the images or the video, the other half of the text."""
        rng = torch.Generator().manual_seed(0)
        text = torch.randint(*TEXT, (batch, text_tokens), generator=rng)
        first = text_tokens // 2
        images = torch.full((batch, self.visual_tokens), self.placeholder)
        ids = torch.cat([text[:, :first], images, text[:, first:]], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.visual_inputs(ids, rng)}
        return {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()}

    def _positions(self, text_tokens: int, new_tokens: int) -> int:
        """Return how many positions a prompt and its answer take."""
        return self.visual_tokens + text_tokens + new_tokens


@dataclass(frozen=True, kw_only=True)
class Llava(Preset):
    """LLaVA-1.5: Vicuna as LLM, CLIP ViT-L/14 as vision encoder, and a projector of two layers."""

    layers: int = 32
    heads: int = 32
    mlp: int = 11_008
    vision_layers: int = 24
    vision_heads: int = 16
    vision_mlp: int = 4_096

    vision_head = 64
    #: The vocabulary in llava-hf: Vicuna's 32,000, the placeholder, and padding to a multiple of 64.
    vocabulary: ClassVar[int] = 32_064
    image_token, pad = 32_000, 32_001
    patch: ClassVar[int] = 14

    @property
    def placeholder(self) -> int:
        return self.image_token

    @property
    def side(self) -> int:
        """Return the side of an image in pixels."""
        return self.grid.rows * self.patch

    def config(self, text_tokens: int = 64, new_tokens: int = 16) -> LlavaConfig:
        vision = CLIPVisionConfig(
            hidden_size=self.vision_width,
            intermediate_size=self.vision_mlp,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_heads,
            image_size=self.side,
            patch_size=self.patch,
            projection_dim=self.vision_width,
        )
        text = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads or self.heads,
            max_position_embeddings=max(4096, self._positions(text_tokens, new_tokens)),
            pad_token_id=self.pad,
        )
        return LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=self.placeholder,
            image_seq_length=self.grid.size,
            tie_word_embeddings=False,
        )

    def visual_inputs(self, ids: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(len(ids) * self.images, 3, self.side, self.side, generator=rng)}


@dataclass(frozen=True, kw_only=True)
class Qwen25VL(Preset):
    """Qwen2.5-VL: an encoder that attends in windows and joins 2 x 2 patches, and an LLM with few key-value heads."""

    is_video: bool = False
    """True for a video, whose frames the encoder joins in pairs: `images` counts the pairs."""
    vocabulary: int
    ties_head: bool
    """True if the output head has the weights of the embeddings."""
    vision_layers: int = 32
    vision_heads: int = 16
    vision_mlp: int = 3_420

    vision_head = 80
    image_token, video_token = 151_655, 151_656
    patch: ClassVar[int] = 14
    merge: ClassVar[int] = 2
    """Patches per side that become one visual token."""
    joined: ClassVar[int] = 2
    """Frames that become one. An image counts as two equal frames."""

    @property
    def placeholder(self) -> int:
        return self.video_token if self.is_video else self.image_token

    def config(self, text_tokens: int = 64, new_tokens: int = 16) -> Qwen2_5_VLConfig:
        vision = dict(
            depth=self.vision_layers,
            hidden_size=self.vision_width,
            intermediate_size=self.vision_mlp,
            num_heads=self.vision_heads,
            patch_size=self.patch,
            spatial_merge_size=self.merge,
            temporal_patch_size=self.joined,
            window_size=112,
            fullatt_block_indexes=[7, 15, 23, 31],
            out_hidden_size=self.width,
        )
        text = dict(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=max(128_000, self._positions(text_tokens, new_tokens)),
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        )
        return Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=self.image_token,
            video_token_id=self.video_token,
            tie_word_embeddings=self.ties_head,
        )

    def visual_inputs(self, ids: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        patches = self.visual_tokens * self.merge**2
        pixels = torch.randn(len(ids) * patches, 3 * self.joined * self.patch**2, generator=rng)
        sizes = torch.tensor([[self.images, self.grid.rows * self.merge, self.grid.cols * self.merge]] * len(ids))
        is_visual = (ids == self.placeholder).long()
        if self.is_video:
            return {"pixel_values_videos": pixels, "video_grid_thw": sizes, "mm_token_type_ids": 2 * is_visual}
        return {"pixel_values": pixels, "image_grid_thw": sizes, "mm_token_type_ids": is_visual}


#: The tokens of an image of 336 x 336 pixels.
_CLIP_336 = Grid(1, 24, 24)
_13B: dict[str, Any] = {"layers": 40, "heads": 40, "mlp": 13_824}
_QWEN_3B: dict[str, Any] = {
    "layers": 36, "heads": 16, "key_value_heads": 2, "mlp": 11_008, "vocabulary": 151_936, "ties_head": True,
}  # fmt: skip
_QWEN_7B: dict[str, Any] = {
    "layers": 28, "heads": 28, "key_value_heads": 4, "mlp": 18_944, "vocabulary": 152_064, "ties_head": False,
}  # fmt: skip
#: An image of 1,008 x 756 pixels, and 8 frames of 588 x 336.
_IMAGE: dict[str, Any] = {"images": 1, "grid": Grid(1, 27, 36)}
_VIDEO: dict[str, Any] = {"images": 4, "grid": Grid(1, 12, 21), "is_video": True}

#: LLaVA-1.5's dimensions; "llava-next" and "video-llava" are these at the visual tokens of LLaVA-NeXT (an overview and
#: four tiles: 2,880) and Video-LLaVA (8 frames of 256: 2,048). "mgm-2b" has the dimensions of Mini-Gemini's Gemma-2B,
#: as heads of 128 instead of 256. Other features of these families are not modelled. Qwen2.5-VL is the whole model.
PRESETS: dict[str, Preset] = {
    "llava-1.5-7b": Llava(images=1, grid=_CLIP_336),
    "llava-1.5-13b": Llava(images=1, grid=_CLIP_336, **_13B),
    "llava-next-7b": Llava(images=5, grid=_CLIP_336),
    "llava-next-13b": Llava(images=5, grid=_CLIP_336, **_13B),
    "video-llava-7b": Llava(images=8, grid=Grid(1, 16, 16)),
    "mgm-2b": Llava(images=1, grid=_CLIP_336, layers=18, heads=16, key_value_heads=2, mlp=16_384),
    "qwen2.5-vl-3b": Qwen25VL(**_QWEN_3B, **_IMAGE),
    "qwen2.5-vl-3b-video": Qwen25VL(**_QWEN_3B, **_VIDEO),
    "qwen2.5-vl-7b": Qwen25VL(**_QWEN_7B, **_IMAGE),
    "qwen2.5-vl-7b-video": Qwen25VL(**_QWEN_7B, **_VIDEO),
}


def make_model(
    config: PreTrainedConfig, device: str | torch.device, dtype: torch.dtype, attention: str = "sdpa"
) -> Model:
    """Return a model with random weights, made on the device. On "meta" it has no weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model: Model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()
