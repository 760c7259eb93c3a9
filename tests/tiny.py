"""Models of every supported family, built tiny from their configs, and inputs for them."""

import copy
from dataclasses import dataclass

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from vlmzip import UserError

IMAGE_TOKEN, PAD, VOCABULARY, SIDE, PATCH = 99, 0, 100, 48, 8
TOKENS = (SIDE // PATCH) ** 2


#: Before 5.19 transformers gives copies of a row the images of its neighbours: refused, where a row has several.
WRONG_COPIES = Version(transformers.__version__) < Version("5.19")
wrong_copies = pytest.mark.xfail(WRONG_COPIES, raises=UserError, strict=True, reason="refused before 5.19")


def tiny_llava(attention: str = "sdpa", **settings) -> LlavaForConditionalGeneration:
    """36 visual tokens of width 32 from a 3-layer CLIP, into a 4-layer Llama of width 48."""
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            pad_token_id=PAD,
            bos_token_id=1,
            eos_token_id=2,
            max_position_embeddings=512,
        ),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=TOKENS,
        **settings,
    )
    return _with_large_weights(LlavaForConditionalGeneration(config), attention)


def prompt(*parts: int | str, tokens: int = TOKENS) -> list[int]:
    """Token ids; the word "image" stands for one image's placeholders."""
    ids: list[int] = []
    for part in parts:
        ids += [IMAGE_TOKEN] * tokens if part == "image" else [part]
    return ids


def batch(*rows: list[int], images: int = 0, pad: str = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    """Model inputs for prompts of different lengths, with random images."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap = longest - len(row)
        ids.append([PAD] * gap + row if pad == "left" else row + [PAD] * gap)
        mask.append([0] * gap + [1] * len(row) if pad == "left" else [1] * len(row) + [0] * gap)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if images:
        generator = torch.Generator().manual_seed(seed)
        inputs["pixel_values"] = torch.randn(images, 3, SIDE, SIDE, generator=generator)
    return inputs


def tiny_tokenizer():
    """Words are numbers and a few letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": IMAGE_TOKEN}
    words |= {f"w{n}": n for n in range(4, IMAGE_TOKEN)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )


def tiny_processor(family: str):
    """A processor of a family from its parts: no file of a hub, no torchvision."""
    from transformers import CLIPImageProcessor, LlavaProcessor, PaliGemmaProcessor, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    tokenizer, size = tiny_tokenizer(), {"height": SIDE, "width": SIDE}
    if family == "paligemma":
        images = SiglipImageProcessorPil(size=size)
        images.image_seq_length = TOKENS
        return PaliGemmaProcessor(images, tokenizer)
    if family == "qwen2_5_vl":
        limits = {"shortest_edge": 16 * 16, "longest_edge": SIDE * SIDE}
        images = Qwen2VLImageProcessorPil(size=limits, patch_size=4, merge_size=2, temporal_patch_size=2)

        class ImagesOnly(Qwen2_5_VLProcessor):
            def check_argument_for_proper_class(self, name, part):  # its part for videos needs torchvision
                return type(part)

        return ImagesOnly(images, tokenizer)
    images = CLIPImageProcessor(size=size, do_center_crop=False)
    return LlavaProcessor(images, tokenizer, PATCH, "default", num_additional_image_tokens=1)


def save_checkpoint(folder, model=None) -> None:
    """A tiny LLaVA with processor, as a folder that `from_pretrained` loads."""
    tiny_processor("llava").save_pretrained(folder)
    (model or tiny_llava()).save_pretrained(folder)


@dataclass
class Family:
    """A tiny model of a family, and how its inputs are made."""

    name: str
    model: PreTrainedModel
    sizes: list[tuple[int, int]]
    """Rows and columns of the tokens of image 0, 1, 2, …; the last repeats."""

    def tokens(self, image: int) -> int:
        rows, cols = self.sizes[min(image, len(self.sizes) - 1)]
        return rows * cols

    def ids(self, *rows: list[int | str], first_image: int = 0) -> list[list[int]]:
        """Token ids of prompts; "image" stands for the placeholders of the next image."""
        out, image = [], first_image
        for row in rows:
            ids: list[int] = []
            for part in row:
                if part == "image":
                    ids += [IMAGE_TOKEN] * self.tokens(image)
                    image += 1
                else:
                    ids.append(int(part))
            out.append(ids)
        return out

    def images(self, first: int, count: int) -> dict[str, torch.Tensor]:
        """The inputs of some images; image n always looks the same."""
        if count == 0:
            return {}
        noise = [torch.Generator().manual_seed(100 + n) for n in range(first, first + count)]
        if self.name != "qwen2_5_vl":
            return {"pixel_values": torch.stack([torch.randn(3, SIDE, SIDE, generator=g) for g in noise])}
        grids = [self.sizes[min(n, len(self.sizes) - 1)] for n in range(first, first + count)]
        thw = torch.tensor([[1, 2 * rows, 2 * cols] for rows, cols in grids])
        pixels = [torch.randn(4 * r * c, 3 * 2 * 4 * 4, generator=g) for (r, c), g in zip(grids, noise, strict=True)]
        return {"pixel_values": torch.cat(pixels), "image_grid_thw": thw}

    def batch(self, *rows: list[int | str], pad: str = "left", first_image: int = 0) -> dict[str, torch.Tensor]:
        """Collator model inputs for prompts with images."""
        inputs = batch(*self.ids(*rows, first_image=first_image), pad=pad)
        inputs |= self.images(first_image, sum(row.count("image") for row in rows))
        if self.name == "qwen2_5_vl":
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE_TOKEN).int()
        if self.name == "paligemma":
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        return inputs


def tiny_paligemma(attention: str = "sdpa") -> PreTrainedModel:
    """36 visual tokens from a SigLIP without CLS, into a Gemma."""
    torch.manual_seed(0)
    config = PaliGemmaConfig(
        vision_config=dict(
            model_type="siglip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=4, image_size=SIDE, patch_size=PATCH, projection_dim=48, vision_use_head=False,
        ),
        text_config=dict(
            model_type="gemma", hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=6,
            num_key_value_heads=2, head_dim=8, vocab_size=VOCABULARY, pad_token_id=PAD, max_position_embeddings=512,
        ),
        image_token_index=IMAGE_TOKEN, projection_dim=48, hidden_size=48,
    )  # fmt: skip
    return _with_large_weights(PaliGemmaForConditionalGeneration(config), attention)


def tiny_qwen(attention: str = "sdpa") -> PreTrainedModel:
    """Any grid; windows of 2 x 2 merged tokens in the first vision block, full attention in the last; M-RoPE."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=4, spatial_merge_size=2,
            temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1], out_hidden_size=48,
        ),
        text_config=dict(
            hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
            vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=1, eos_token_id=2, max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        ),
        image_token_id=IMAGE_TOKEN, video_token_id=98, vision_start_token_id=97, vision_end_token_id=96,
    )  # fmt: skip
    return _with_large_weights(Qwen2_5_VLForConditionalGeneration(config), attention)


def tiny_vipllava(attention: str = "sdpa") -> PreTrainedModel:
    """36 visual tokens whose features come from two layers of CLIP side by side."""
    torch.manual_seed(0)
    base = tiny_llava().config
    config = VipLlavaConfig(
        vision_config=base.vision_config, text_config=base.text_config, image_token_index=IMAGE_TOKEN,
        vision_feature_layers=[-2, 1],
    )  # fmt: skip
    return _with_large_weights(VipLlavaForConditionalGeneration(config), attention)


FAMILIES = {
    "llava": lambda: Family("llava", tiny_llava(), [(6, 6)]),
    "vipllava": lambda: Family("vipllava", tiny_vipllava(), [(6, 6)]),
    "paligemma": lambda: Family("paligemma", tiny_paligemma(), [(6, 6)]),
    "qwen2_5_vl": lambda: Family("qwen2_5_vl", tiny_qwen(), [(4, 6), (5, 3), (4, 6), (6, 7)]),
}


def wider(model: PreTrainedModel) -> PreTrainedModel:
    """A model like this one whose widths are multiples of 64, as 4-bit weights need them; its weights are others."""
    config = copy.deepcopy(model.config)
    for part in (config, config.vision_config, config.text_config):
        for name, value in {"hidden_size": 64, "intermediate_size": 128, "projection_dim": 64}.items():
            if name in vars(part):
                setattr(part, name, value)
    config.text_config.num_attention_heads, config.text_config.num_key_value_heads = 8, 4
    config.vision_config.out_hidden_size = 64
    torch.manual_seed(0)
    return _with_large_weights(type(model)(config), "sdpa")


def _with_large_weights(model: PreTrainedModel, attention: str) -> PreTrainedModel:
    """Weights of the usual 0.02 make all tokens alike; larger ones make attention and answers depend on the image."""
    model.eval().set_attn_implementation(attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                vision = "vision_tower" in name or "visual" in name
                parameter.normal_(0, 0.3 if vision else 0.15, generator=generator)
        # No trained model answers with a placeholder or a marker of images.
        model.get_output_embeddings().weight[96:] = 0
    return model
