"""mini's model before training: a LLaVA like the large ones, but small."""

import math

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from recipes.mini.recipe import Shape
from recipes.mini.tokenizer import make_tokenizer


def make_config(shape: Shape) -> LlavaConfig:
    tokenizer = make_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.vision_mlp,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.heads,
        image_size=shape.image,
        patch_size=shape.patch,
        projection_dim=shape.hidden,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.text_mlp,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()["<image>"],
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
        image_seq_length=shape.visual_tokens,
        tie_word_embeddings=False,
    )


def make_model(shape: Shape, seed: int) -> LlavaForConditionalGeneration:
    """Make a model with new weights. The same seed gives the same weights."""
    torch.manual_seed(seed)
    config = make_config(shape)
    config._attn_implementation = "eager"  # trains faster than SDPA at this size on a CPU
    model = LlavaForConditionalGeneration(config)
    embeddings = model.model.vision_tower.embeddings
    with torch.no_grad():
        # Patch and position embeddings start equally strong. With CLIP's small initial values, the encoder learns
        # positions late or never.
        torch.nn.init.normal_(embeddings.patch_embedding.weight, std=0.05)
        embeddings.position_embedding.weight[1:] = 0.5 * plane_waves(shape.rows, shape.hidden)
        _start_language(model, shape)
    return model


def _start_language(model: LlavaForConditionalGeneration, shape: Shape) -> None:
    """Initialize the LLM and the projector for a hidden size of 192.

    Llama's usual standard deviation of 0.02 suits hidden sizes of thousands. Here it would shrink signals to a quarter
    in each layer, and training would start slowly.
    """
    keep = shape.hidden**-0.5
    for name, weight in model.model.language_model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=keep / 2)
        elif name.endswith("proj.weight"):
            torch.nn.init.normal_(weight, std=keep)
    torch.nn.init.normal_(model.model.get_input_embeddings().weight, std=0.5)
    torch.nn.init.normal_(model.lm_head.weight, std=keep / 2)
    # The encoder's features are about twice as strong as these embeddings; the projector compensates for it.
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_1.weight, std=keep / 2)
    torch.nn.init.normal_(model.model.multi_modal_projector.linear_2.weight, std=keep)


def plane_waves(rows: int, hidden: int) -> torch.Tensor:
    """Return position embeddings [rows*rows hidden]: sines and cosines of the column, then of the row."""
    rates = torch.exp(-math.log(100.0) * torch.arange(hidden // 4) / (hidden // 4))
    angles = torch.arange(rows)[:, None] * rates
    line = torch.cat([angles.sin(), angles.cos()], 1)
    columns, across = line.repeat(rows, 1), line.repeat_interleave(rows, 0)
    return torch.cat([columns, across], 1)


def visual_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Return the features that LLaVA gives to its projector, [batch tokens dim], from pixels [batch 3 side side]."""
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return states[model.config.vision_feature_layer][:, 1:]
