"""The tiny models: what a config needs besides small sizes, for each model folder of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import transformers
from transformers import PreTrainedModel

from vlmzip.lab.conformance import images
from vlmzip.lab.conformance.images import Inputs
from vlmzip.lab.conformance.tiny import Settings


@dataclass(frozen=True)
class Tiny:
    """What differs from the default tiny model."""

    changes: Settings = field(default_factory=dict)
    """Fields of the config by dotted name."""
    images: Callable[[PreTrainedModel, list[int]], Inputs] | None = None
    """The function that makes image inputs. By default it follows from the parameters of `get_image_features`."""
    placeholders: Callable[[PreTrainedModel, Inputs, int], list[int]] | None = None
    """The function that writes the tokens of one image, if not all are placeholders: from the model, the inputs of the
    image and the number of its visual tokens."""
    package: str = ""
    """A package that the model needs besides transformers."""
    refused: str = ""
    """The reason why no model of the folder can be tried."""
    plain_fails: str = ""
    """The reason why the model fails without vlmzip."""


#: Pinpoints of LLaVA-NeXT for views of 24 pixels: one column or row of two views, or four views.
PINPOINTS = [[24, 48], [48, 24], [48, 48]]
#: A small encoder of timm.
TIMM = {
    "vision_config.architecture": "test_convnext",
    "vision_config.model_args": None,
    "vision_config.hidden_size": 64,
    "vision_config.image_size": 96,
}
#: Up to transformers 5.23 it works.
LLAMA4_FAILS = (
    "transformers 5.24.0 has a bug: its forward reads image_outputs from the output of its LLM, which has none, also"
    " without images; with transformers 5.18 to 5.23 it works"
)
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


def _visual_words(name: Callable[[int], str]) -> dict[str, int]:
    """Return a vocabulary in which 64 tokens stand for the codes of an image."""
    return {"<image>": 5, "<|extra_200|>": images.SEPARATOR} | {name(code): 120 + code for code in range(64)}


FAMILIES: dict[str, Tiny] = {
    "apertus1p5": Tiny(
        {
            "audio_config.codebook_dim": 32,
            "vision_config.resolution": 24,
            "audio_config.num_filters": 4,
            "vision_config.codebook_size": 64,
            "vision_config.base_channels": 32,
            "vision_config.latent_channels": 32,
            "vision_config.channel_multiplier": [1, 1, 1],
            "vision_config.num_res_blocks": 1,
            "image_token_offset": 120,
            "audio_token_offset": 184,
            "audio_config.codebook_size": 32,
        },
        placeholders=images.in_rows,
    ),
    "aria": Tiny({"projector_patch_to_query_dict": {36: 9}}),
    "blip_2": Tiny({"image_token_index": 5, "num_query_tokens": 4}),
    "chameleon": Tiny(
        {
            "vocabulary_map": _visual_words(lambda code: f"IMGIMG{chr(65 + code // 10)}{chr(65 + code % 10)}Z"),
            "image_token_id": 5,
            "vq_config.num_embeddings": 64,
            "vq_config.base_channels": 32,
            "vq_config.latent_channels": 32,
            "vq_config.channel_multiplier": [1, 1, 1],
            "vq_config.num_res_blocks": 1,
            "vq_config.resolution": 24,
        }
    ),
    "cohere_compass": Tiny({"text_config.rope_parameters": {"full_attention": MROPE}}),
    "deepseek_ocr2": Tiny(
        {
            "text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "text_config.num_experts_per_tok": 2,
            "vision_config.sam_config.image_size": 64,
            "vision_config.sam_config.output_channels": 32,
            "vision_config.sam_config.downsample_channels": [32, 32],
        },
        images=images.with_local_views,
    ),
    "deepseek_vl_hybrid": Tiny(
        {"high_res_vision_config.output_channels": 8, "high_res_vision_config.image_size": 48},
        images=images.two_resolutions,
    ),
    "diffusion_gemma": Tiny(refused="it denoises blocks of text instead of writing token after token"),
    "dots3_note": Tiny(
        {
            "text_config.num_key_value_heads": 4,
            "text_config.head_dim": 16,
            "text_config.swa_num_attention_heads": 4,
            "text_config.swa_num_key_value_heads": 4,
            "text_config.swa_q_lora_rank": 16,
            "text_config.swa_kv_lora_rank": 16,
            "text_config.swa_head_dim": 16,
            "text_config.swa_qk_nope_head_dim": 8,
            "text_config.swa_v_head_dim": 8,
            "audio_config.adapter_input_size": 32,
            "vision_config.adapter_in_dim": 32,
            "vision_config.pyramid_num_routed": [-1, -1, 2, 4],
        }
    ),
    "embedding_gemma2": Tiny(refused="it makes embeddings and has no language modelling head"),
    "emu3": Tiny(
        {
            "vocabulary_map": _visual_words(lambda code: f"<|visual token {code:06d}|>"),
            "image_token_id": 5,
            "vq_config.codebook_size": 64,
            "vq_config.base_channels": 32,
            "vq_config.num_attention_heads": 1,
            "vq_config.num_res_blocks": 1,
            "vq_config.channel_multiplier": [1, 1, 1],
            "vq_config.embed_dim": 4,
            "text_config.attention_dropout": 0.0,
        }
    ),
    "ernie4_5_vl_moe": Tiny({"text_config.rope_parameters": MROPE}),
    "fast_vlm": Tiny(TIMM, package="timm"),
    "florence2": Tiny(refused="it is an encoder-decoder whose forward takes no mm_encoder_outputs"),
    "fuyu": Tiny(images=images.flat_patches, placeholders=images.in_rows),
    "gemma3": Tiny({"mm_tokens_per_image": 9}),
    "gemma3n": Tiny(TIMM | {"vision_soft_tokens_per_image": 9, "text_config.num_kv_shared_layers": 0}, package="timm"),
    "gemma4": Tiny(images=images.padded_patches),
    "gemma4_unified": Tiny(
        {"vision_config.mm_embed_dim": 32, "vision_config.output_proj_dims": 32}, images=images.padded_patches
    ),
    "glm4v_moe": Tiny({"text_config.head_dim": 16, "text_config.rope_parameters": MROPE}),
    "glm5_next": Tiny(
        {
            "text_config.num_key_value_heads": 4,
            "text_config.qk_rope_head_dim": 0,
            "text_config.linear_head_dim": 8,
            "text_config.linear_num_heads": 4,
            "vision_config.projection_intermediate_size": 64,
        }
    ),
    "glm_image": Tiny(refused="it writes the codes of an image instead of text"),
    "granite4_vision": Tiny(
        {
            "vision_config.hidden_size": 64,
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[1, 0], [2, 1]],
            "spatial_target_layers": [0, 1, 2, 3],
            "image_grid_pinpoints": PINPOINTS,
        },
    ),
    "granite_docling": Tiny(
        {
            "vision_config.image_size": 32,
            "text_config.attention_multiplier": 0.35,
            "text_config.embedding_multiplier": 1.0,
            "text_config.logits_scaling": 1.0,
            "text_config.residual_multiplier": 1.0,
        },
        images=images.masked_tiles,
    ),
    "hunyuan_vl": Tiny(
        {"text_config.head_dim": 8, "text_config.rope_parameters": MROPE | {"mrope_section": [1, 1, 1, 1]}}
    ),
    "inkling": Tiny(images=images.cubes),
    "inkling2": Tiny(images=images.token_pixels),
    "inkling2_loop": Tiny(images=images.token_pixels),
    "instructblip": Tiny(images=images.with_question),
    "instructblipvideo": Tiny(refused="it takes only videos: it has no get_image_features"),
    "kimi_k25": Tiny(images=images.square_patches),
    # By default all layers attend; published models have convolutions between attention layers.
    "lfm2_vl": Tiny({"text_config.layer_types": ["conv", "full_attention", "conv", "full_attention"]}),
    "llama4": Tiny(
        {"vision_config.intermediate_size": 128},
        plain_fails=LLAMA4_FAILS if transformers.__version__ == "5.24.0" else "",
    ),
    "llava_next": Tiny({"image_grid_pinpoints": PINPOINTS}),
    "llava_next_video": Tiny({"image_grid_pinpoints": PINPOINTS}),
    "llava_onevision": Tiny({"image_grid_pinpoints": PINPOINTS}),
    "mini_gemini": Tiny(
        {
            "aux_config.hidden_sizes": [8, 12, 16, 20],
            "aux_config.depths": [1, 1, 1, 1],
            "aux_config.layer_scale_init_value": 1.0,
        },
        images=images.twice,
    ),
    "minicpm_ocr": Tiny({"insert_layer_id": 1, "vision_config.insert_layer_id": 1}),
    "minicpmv4_6": Tiny({"insert_layer_id": 1, "vision_config.insert_layer_id": 1}),
    "minicpmv4_7": Tiny({"insert_layer_id": 1, "vision_config.insert_layer_id": 1}),
    "mistral3": Tiny(placeholders=images.rows_with_breaks),
    "mistral_large4": Tiny(placeholders=images.rows_with_breaks),
    "molmo2": Tiny(
        {"adapter_config.vision_feature_layer": [3, 1], "vision_config.num_position_embeddings": 36},
        images.pooled_crops,
        images.two_grids,
    ),
    "muse_glimmer": Tiny({"out_hidden_size": 128}),
    "muse_spark": Tiny({"out_hidden_size": 128}),
    "nemotron_h_omni": Tiny(images=images.patches_by_side),
    "ovis2": Tiny(placeholders=images.indicated),
    "paddleocr_vl": Tiny(images=images.square_patches),
    "pe_audio_video": Tiny(refused="it compares video, audio and text; it has no class that generates text"),
    "perception_lm": Tiny(package="timm"),
    "qwen2_5_omni": Tiny({"vision_start_token_id": 0, "vision_end_token_id": 0}, placeholders=images.between_marks),
    "qwen3_omni_moe": Tiny({"vision_start_token_id": 0, "vision_end_token_id": 0}, placeholders=images.between_marks),
    "qwen4_exp": Tiny(
        {
            "text_config.indexer_n_heads": 2,
            "text_config.indexer_kv_heads": 1,
            "text_config.indexer_head_dim": 8,
            "text_config.indexer_budget": 64,
            "text_config.indexer_compress_ratio": 4,
        }
    ),
    "step3p7": Tiny({"text_config.sliding_window": 512}, placeholders=images.local_views_between_marks),
    "t5gemma2": Tiny(refused="only its encoder takes mm_encoder_outputs, the class that generates text does not"),
    "unlimited_ocr": Tiny(
        {"vision_config.sam_config.downsample_channels": [32, 32], "vision_config.sam_config.image_size": 64}
    ),
    "video_llama_3": Tiny(images=images.merging_patches),
    "vipllava": Tiny({"vision_feature_layer": [-2, -3]}),
}
