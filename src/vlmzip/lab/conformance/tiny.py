"""Tiny models with random weights, made from the config class of any vision-language model of transformers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TypeGuard

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from vlmzip.mini_gemini import MiniGeminiForConditionalGeneration

#: Fields of a config, by name.
Settings = dict[str, Any]
#: Values for the fields of every config, by the field's name. Fields that are no whole numbers keep their defaults.
SMALL: dict[str, int] = {
    **dict.fromkeys(
        [
            "hidden_size", "d_model", "embed_dim", "width", "dim", "n_embd", "mm_hidden_size", "out_hidden_size",
            "output_dim", "projection_dim", "vision_output_dim", "projector_input_dim", "projector_output_dim",
            "text_hidden_size", "projector_hidden_size", "projector_hidden_dim", "vision_hidden_size",
            "encoder_hidden_size", "word_embed_proj_dim", "adapter_out_dim", "vision_embed_dim",
            "projection_hidden_size", "projection_hidden_dim", "moe_hidden_size", "ple_embed_dim",
        ],
        32,
    ),
    **dict.fromkeys(
        [
            "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "mlp_dim", "intermediate_size_mlp",
            "alignment_intermediate_size", "share_expert_dim", "moe_shared_expert_intermediate_size",
        ],
        64,
    ),
    **dict.fromkeys(
        ["moe_intermediate_size", "shared_expert_intermediate_size", "shared_experts_intermediate_size"], 32
    ),
    **dict.fromkeys(["num_hidden_layers", "depth", "num_layers", "n_layers", "encoder_layers", "decoder_layers"], 4),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_heads", "attention_heads"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_topk"], 2),
    "num_key_value_heads": 2,
    **dict.fromkeys(["n_group", "topk_group"], 1),
    "head_dim": 8,
    # LLMs with several kinds of attention
    **dict.fromkeys(["swa_num_attention_heads", "num_sliding_attention_heads", "linear_num_value_heads"], 4),
    **dict.fromkeys(["swa_num_key_value_heads", "linear_num_key_heads", "index_n_heads"], 2),
    **dict.fromkeys(["swa_head_dim", "linear_key_head_dim", "linear_value_head_dim"], 8),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"], 8),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "index_head_dim", "ssm_state_size", "hc_lowrank"], 16),
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    **dict.fromkeys(["vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input"], 256),
    "hidden_size_per_layer_input": 8,
    "max_position_embeddings": 1024,
    "image_size": 24,
    "max_image_size": 32,
    "patch_size": 4,
}  # fmt: skip
#: Fields that follow from others: configs compute them anew.
DERIVED = (
    "layer_types", "mlp_layer_types", "per_layer_config", "qk_head_dim", "id2label", "label2id",
    "transformers_version", "_name_or_path",
)  # fmt: skip
#: Names of the number of layers.
DEPTHS = ("num_hidden_layers", "depth", "num_layers", "n_layers", "encoder_layers")
#: Models of vlmzip, by the name of their package.
OURS: dict[str, type[PreTrainedModel]] = {"mini_gemini": MiniGeminiForConditionalGeneration}
PAD, BOS, EOS, FIRST_SPECIAL = 0, 1, 2, 10


def folders() -> list[str]:
    """Return the model folders whose models take `mm_encoder_outputs`: those of transformers, and ours."""
    models = Path(transformers.__file__).parent / "models"
    files = sorted(models.glob("*/modeling_*.py"))
    return sorted({file.parent.name for file in files if "mm_encoder_outputs" in file.read_text()} | OURS.keys())


def model_class(folder: str) -> type[PreTrainedModel] | None:
    """Return the first class of a folder that generates text and takes `mm_encoder_outputs`, or `None`."""
    if folder in OURS:
        return OURS[folder]
    for file in sorted((Path(transformers.__file__).parent / "models" / folder).glob("modeling_*.py")):
        module = importlib.import_module(f"transformers.models.{folder}.{file.stem}")
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__ and _answers_about_images(cls):
                return cls
    return None


def _answers_about_images(cls: type) -> TypeGuard[type[PreTrainedModel]]:
    if not issubclass(cls, PreTrainedModel) or not hasattr(cls, "generate"):
        return False
    takes_images = "mm_encoder_outputs" in inspect.signature(cls.forward).parameters
    return takes_images and hasattr(cls, "prepare_inputs_for_generation") and not cls.__name__.endswith("Model")


def tiny_config(cls: type[PretrainedConfig], changes: Settings) -> PretrainedConfig:
    """Return a config of a few thousand weights. `changes` has dotted names, such as `vision_config.depth`."""
    settings = _shrunk(cls())
    for name, value in changes.items():
        *parents, field = name.split(".")
        place = settings
        for parent in parents:
            place = place.setdefault(parent, {})
        place[field] = value
    config = cls(**{name: value for name, value in settings.items() if name != "model_type"})
    _number_special_tokens(config, keep={name.rpartition(".")[2] for name in changes})
    return config


def tiny_model(cls: type[PreTrainedModel], changes: Settings) -> PreTrainedModel:
    """Return a model with random weights that are large enough for answers to depend on images."""
    torch.manual_seed(0)
    config = tiny_config(cls.config_class, changes)  # type: ignore[arg-type]
    model = cls(config).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2 and parameter.is_floating_point():
                parameter.normal_(0, 0.2, generator=rng)
    return model


def _shrunk(config: PretrainedConfig) -> Settings:
    settings: Settings = {}
    values = config.to_dict()
    depth = next((values[name] for name in DEPTHS if type(values.get(name)) is int), 0)
    for name, value in values.items():
        part = vars(config).get(name)
        if name == "vision_config" and part is None:  # some configs describe an LLM alone by default
            part = config.sub_configs_defaults[name].config_class()
        if isinstance(part, PretrainedConfig):
            settings[name] = _shrunk(part)
        elif name == "num_key_value_heads" and value == values.get("num_attention_heads"):
            settings[name] = SMALL["num_attention_heads"]  # such LLMs may not share keys among heads
        elif name in SMALL and type(value) is int and value:
            settings[name] = SMALL[name]
        elif name not in DERIVED:
            settings[name] = _shrunk_list(name, value, depth) if isinstance(value, list) and depth else value
    has_axes = "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ())
    if has_axes or ("vocab_size" in settings and "rope_type" in (settings.get("rope_parameters") or {})):
        rope = settings.get("rope_parameters") or {"rope_type": "default", "rope_theta": 10000.0}
        settings["rope_parameters"] = _with_three_axes(settings, rope)
    return settings


def _shrunk_list(name: str, values: list[Any], depth: int) -> list[object]:
    """Return a list that holds a value per layer, or indexes of layers, for fewer layers."""
    layers = SMALL["num_hidden_layers"]
    if name in SMALL and all(type(value) is int for value in values):
        values = [SMALL[name]] * len(values)
    if name.endswith("indexes"):
        return sorted({value * layers // depth for value in values})
    return values[:layers] if len(values) == depth else values


def _with_three_axes(settings: Settings, rope: Settings) -> Settings:
    """Return rope parameters with parts for time, height and width. LLMs with one axis do not look at the parts."""
    head = settings.get("qk_rope_head_dim") or settings.get("head_dim") or SMALL["head_dim"]
    share = max(rope.get("partial_rotary_factor", 1), 0.75)  # three axes need three pairs of dimensions
    pairs = int(head * share) // 2
    partial = {"partial_rotary_factor": share} if "partial_rotary_factor" in rope else {}
    return {**rope, **partial, "mrope_section": [pairs - pairs // 3 * 2, pairs // 3, pairs // 3]}


def _number_special_tokens(config: PretrainedConfig, keep: Collection[str]) -> None:
    """Give each special token another id within the small vocabulary. Fields in `keep` stay."""
    numbers: Settings = {
        "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "decoder_start_token_id": BOS
    }  # fmt: skip
    count = 0
    for part in _parts(config):
        for name in list(vars(part)):
            # image_token_index and image_patch_id are other names for image_token_id
            key = name.replace("token_index", "token_id").replace("image_patch_id", "image_token_id")
            if name in keep or not key.endswith(("token_id", "token_ids")):
                continue
            value = getattr(part, name, None)
            if type(value) not in (int, list) and key != "image_token_id":
                continue
            if key not in numbers:
                several = len(value) if isinstance(value, list) and key.endswith("ids") else 0
                first = FIRST_SPECIAL + count
                numbers[key] = list(range(first, first + several)) if several else first
                count += several or 1
            setattr(part, name, numbers[key])


def _parts(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    yield config
    for value in vars(config).values():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value)
