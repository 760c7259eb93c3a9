"""Tiny LLaVA-NeXT and LLaVA-OneVision with random weights and mini's words, written as folders that vLLM loads."""

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from vlmzip import mini
from vlmzip.serving.vllm.checkpoint import write_checkpoint

SIDE, PATCH = 64, 8
PINPOINTS = [[64, 128], [128, 64], [128, 128]]
VIDEO = "<|video_pad|>"
VIT = dict(
    hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=PATCH
)
LLM = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
    bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=2048,
)  # fmt: skip


def tokenizer():
    words = AutoTokenizer.from_pretrained(mini.weights_folder())
    words.add_tokens([VIDEO], special_tokens=True)
    return words


def llava_next(folder):
    words = tokenizer()
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VIT, projection_dim=64),
        text_config=LlamaConfig(**LLM, vocab_size=len(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(images, words, PATCH, "default", num_additional_image_tokens=1)
    return written(LlavaNextForConditionalGeneration, config, processor, folder)


def llava_onevision(folder):
    from transformers import LlavaOnevisionVideoProcessor  # needs torchvision

    words = tokenizer()
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**VIT, vision_use_head=False),
        text_config=Qwen2Config(**LLM, vocab_size=len(words)),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids(VIDEO),
        image_grid_pinpoints=[[SIDE * rows, SIDE * cols] for rows in range(1, 7) for cols in range(1, 7)],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=config.image_grid_pinpoints),
        words,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        image_token="<image>",
        video_token=VIDEO,
        vision_aspect_ratio="anyres_max_9",
    )
    return written(LlavaOnevisionForConditionalGeneration, config, processor, folder)


def written(model_class, config, processor, folder):
    """Make the model, write it to the folder, and return it with its processor."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so large that answers depend on the image
            parameter.mul_(3)
    write_checkpoint(model, processor, folder)
    return model, processor


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def image(seed, width, height):
    return Image.fromarray(noise(seed, height, width, 3))
