"""Models of published dimensions with random weights, for speed and memory. They need no download."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlmzip.errors import UserError
from vlmzip.keep import round_half_up

#: LLaVA-1.5's vocabulary in llava-hf: Vicuna's 32,000, the placeholder, and padding to a multiple of 64.
VOCABULARY, PLACEHOLDER, PAD = 32_064, 32_000, 32_001
#: Width of an attention head in Vicuna and in CLIP ViT-L.
LLM_HEAD, VISION_HEAD = 128, 64
PATCH = 14


@dataclass(frozen=True)
class Preset:
    """Dimensions of a LLaVA: Vicuna as LLM, CLIP ViT-L/14 as vision encoder, and a projector of two layers."""

    images: int
    """Images per prompt. Tiles and frames count as images."""
    side: int
    """The side of an image, in pixels."""
    layers: int = 32
    heads: int = 32
    key_value_heads: int | None = None
    """Heads of keys and values in the LLM; `None` for as many as `heads`."""
    mlp: int = 11_008
    vision_layers: int = 24
    vision_heads: int = 16
    vision_mlp: int = 4_096

    @property
    def visual_tokens(self) -> int:
        """Return the number of visual tokens in a prompt."""
        return self.images * (self.side // PATCH) ** 2

    @property
    def width(self) -> int:
        return self.heads * LLM_HEAD

    @property
    def vision_width(self) -> int:
        return self.vision_heads * VISION_HEAD

    def scaled(self, scale: float) -> Preset:
        """Return a narrower preset: attention heads and MLP widths times `scale`, rounded, at least one head.

        Layers, head size, vocabulary, images and tokens stay, so that token profiles equal the published ones.
        """
        if not 0 < scale <= 1:
            raise UserError(f"scale {scale:g}: give a number above 0 and up to 1")
        names = ["heads", "mlp", "vision_heads", "vision_mlp"] + ["key_value_heads"] * (
            self.key_value_heads is not None
        )
        return dataclasses.replace(self, **{n: max(1, round_half_up(getattr(self, n) * scale)) for n in names})


_13B = {"layers": 40, "heads": 40, "mlp": 13_824}

#: LLaVA-1.5's dimensions; "llava-next" and "video-llava" are these at the visual tokens of LLaVA-NeXT (an overview and
#: four tiles: 2,880) and Video-LLaVA (8 frames of 256: 2,048). "mgm-2b" has the dimensions of Mini-Gemini's Gemma-2B,
#: as heads of 128 instead of 256. Other features of these families are not modelled.
PRESETS = {
    "llava-1.5-7b": Preset(images=1, side=336),
    "llava-1.5-13b": Preset(images=1, side=336, **_13B),
    "llava-next-7b": Preset(images=5, side=336),
    "llava-next-13b": Preset(images=5, side=336, **_13B),
    "video-llava-7b": Preset(images=8, side=224),
    "mgm-2b": Preset(images=1, side=336, layers=18, heads=16, key_value_heads=2, mlp=16_384),
}


def make_config(preset: Preset, text_tokens: int = 64, new_tokens: int = 16) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=preset.vision_width,
        intermediate_size=preset.vision_mlp,
        num_hidden_layers=preset.vision_layers,
        num_attention_heads=preset.vision_heads,
        image_size=preset.side,
        patch_size=PATCH,
        projection_dim=preset.vision_width,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=preset.width,
        intermediate_size=preset.mlp,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.key_value_heads or preset.heads,
        max_position_embeddings=max(4096, preset.visual_tokens + text_tokens + new_tokens),
        pad_token_id=PAD,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=PLACEHOLDER,
        image_seq_length=preset.visual_tokens // preset.images,
        tie_word_embeddings=False,
    )


def make_model(
    config: LlavaConfig, device: str | torch.device, dtype: torch.dtype, attention: str = "sdpa"
) -> LlavaForConditionalGeneration:
    """Return a model with random weights, made on the device. On "meta" it has no weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


def make_inputs(
    preset: Preset, batch: int, text_tokens: int, device: str | torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return a batch of prompts: half of the text, the images (noise), the other half of the text."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 32_000, (batch, text_tokens), generator=generator)
    first = text_tokens // 2
    images = torch.full((batch, preset.visual_tokens), PLACEHOLDER)
    ids = torch.cat([text[:, :first], images, text[:, first:]], 1)
    pixels = torch.randn(batch * preset.images, 3, preset.side, preset.side, generator=generator)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": pixels.to(device, dtype),
    }
