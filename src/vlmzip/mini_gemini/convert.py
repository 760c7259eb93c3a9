"""Make a checkpoint for `MiniGeminiForConditionalGeneration` from the three that Mini-Gemini's authors use.

These are their own (the LLM with projector and miner), OpenAI's CLIP and OpenCLIP's ConvNeXt. Encoders that the authors
tuned are inside their checkpoint, and replace those of the others.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    ConvNextConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vlmzip.errors import UserError, refusing
from vlmzip.files import is_file, is_folder
from vlmzip.json_text import read_json
from vlmzip.mini_gemini import weights
from vlmzip.mini_gemini.configuration import MiniGeminiConfig
from vlmzip.mini_gemini.image_processing import MiniGeminiImageProcessor
from vlmzip.mini_gemini.modeling import MiniGeminiForConditionalGeneration
from vlmzip.mini_gemini.processing import MiniGeminiProcessor
from vlmzip.mini_gemini.templates import template_of
from vlmzip.mini_gemini.weights import Weights

IMAGE_TOKEN = "<image>"
#: The rows of the embedding are a multiple of this, for the sake of fast matrix products.
ROWS = 64
#: Fields of older configs that today's have under other names.
OLDER_FIELDS = ("rope_theta", "rope_scaling")
#: The width of the last stage of `convnext_xxlarge`, whose norms have another epsilon.
XXLARGE = 3072


def convert(llm: Path, clip: Path, convnext: Path, out: Path) -> None:
    """Write the checkpoint and its processor into the new folder `out`, or nothing if that fails.

    `llm` and `clip` are folders, and `convnext` is a folder or a file. Raise `UserError` if they are not what they
    should be, or do not fit together.
    """
    published = _published_config(llm)
    text_config, vision_config = _text_config(llm, published), _vision_config(clip)
    _check_numbers(llm, published, vision_config)
    checkpoint = _read(llm, _is_beside_llm)
    trunk = _read(convnext, weights.is_convnext)
    trunk_weights = weights.convnext_weights(trunk) | weights.tuned_convnext_weights(checkpoint)
    config = MiniGeminiConfig(
        text_config=text_config,
        vision_config=vision_config,
        aux_config=_aux_config(convnext, trunk_weights),
        vision_feature_layer=published["mm_vision_select_layer"],
        image_grid=published.get("image_grid", 1),
    )
    with refusing(f"cannot load {str(llm)!r}"):
        tokenizer = AutoTokenizer.from_pretrained(llm, config=text_config)
    with torch.device("meta"):
        model = MiniGeminiForConditionalGeneration(config)
    _fill(model, _loaded(AutoModelForCausalLM, llm, text_config, dtype="auto"), _clip(clip, vision_config, checkpoint))
    _load(model.model.vision_tower_aux, trunk_weights, "the ConvNeXt")
    for name in ("patch_miner", "multi_modal_projector"):
        _load(model.model.get_submodule(name), weights.module_weights(checkpoint, name), repr(str(llm)))
    _as_one_dtype(model)
    _add_image_token(model, tokenizer)
    processor = _processor(config, published["image_size_aux"], tokenizer)
    with refusing(f"cannot write {str(out)!r}"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out.parent, prefix=f"{out.name}-") as folder:
            whole = Path(folder) / out.name
            model.save_pretrained(whole)
            processor.save_pretrained(whole)
            whole.rename(out)


# --- configs --------------------------------------------------------------------------------------------------------


def _published_config(llm: Path) -> Mapping[str, Any]:
    """Return the config of a checkpoint of the authors. Raise `UserError` if it is of another kind."""
    _check_folder(llm)
    published = read_json(llm / "config.json")
    if not isinstance(published, dict):
        raise UserError(f"cannot load {str(llm)!r}: its config.json is not a JSON object")
    if "text_config" in published:
        raise UserError(f"{str(llm)!r} is no checkpoint of the authors: it has been converted already")
    needed = ("mm_vision_tower_aux", "image_size_aux", "mm_vision_select_layer")
    if missing := [name for name in needed if name not in published]:
        raise UserError(f"{str(llm)!r} is no checkpoint of Mini-Gemini: its config.json has no {missing[0]}")
    known = {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch"}
    for name, value in known.items():
        if published.get(name, value) != value:
            raise UserError(f"{str(llm)!r} has {name}={published[name]!r}; only {value!r} can be converted")
    return published


def _check_numbers(llm: Path, published: Mapping[str, Any], vision: CLIPVisionConfig) -> None:
    """Raise `UserError` for numbers in a config of the authors that no model has."""
    depth, grid = vision.num_hidden_layers, published.get("image_grid", 1)
    for name, least, most in (
        ("image_size_aux", 1, None),
        ("image_grid", 1, None),
        ("mm_vision_select_layer", -depth - 1, depth),
    ):
        value = published.get(name, 1)
        if type(value) is not int or value < least or (most is not None and value > most):
            wanted = f"of {least} or more" if most is None else f"from {least} to {most}"
            raise UserError(f"{str(llm)!r} has {name}={value!r} in its config.json; it must be an integer {wanted}")
    if grid > 1 and not published.get("image_global"):
        raise UserError(f"{str(llm)!r} has crops without a global view, which cannot be converted")


def _text_config(llm: Path, published: Mapping[str, object]) -> PreTrainedConfig:
    """Return the config of the LLM, whose kind is a part of the class's name, as in MGMGemmaForCausalLM."""
    listed = published.get("architectures") or [""]
    architecture = str(listed[0] if isinstance(listed, list) else listed)
    kind = re.fullmatch(r"(?:MGM|MiniGemini)(Llama|Gemma)ForCausalLM", architecture)
    if kind is None:
        raise UserError(
            f"{str(llm)!r} has the architecture {architecture!r}; only MGMLlamaForCausalLM and MGMGemmaForCausalLM can"
            " be converted"
        )
    config_class = CONFIG_MAPPING[kind[1].lower()]
    known = config_class().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    fields = {name: value for name, value in published.items() if name in {*known, *OLDER_FIELDS}}
    with refusing(f"cannot read the config of {str(llm)!r}"):
        config: PreTrainedConfig = config_class.from_dict(fields)
    return config


def _vision_config(clip: Path) -> CLIPVisionConfig:
    _check_folder(clip)
    with refusing(f"cannot load {str(clip)!r}"):
        config: CLIPVisionConfig = CLIPVisionConfig.from_pretrained(clip)
    return config


def _aux_config(convnext: Path, trunk: Weights) -> ConvNextConfig:
    """Return the config that follows from the shapes of a ConvNeXt's weights."""
    widths, depths = weights.convnext_shape(trunk)
    if not widths:
        raise UserError(f"{str(convnext)!r} has no ConvNeXt of OpenCLIP or timm, whose weights are named stem.0.weight")
    if widths[-1] == XXLARGE:
        raise UserError(f"{str(convnext)!r} is convnext_xxlarge, which cannot be converted; give convnext_large_d_320")
    return ConvNextConfig(hidden_sizes=widths, depths=depths, num_stages=len(widths))


# --- weights --------------------------------------------------------------------------------------------------------


def _is_beside_llm(name: str) -> bool:
    return re.search(r"mm_projector|vlm_uni|vision_tower", name) is not None


def _read(source: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """Return the wanted weights of a file, or of a folder's safetensors files, or else its pickled ones."""
    if not is_file(source):
        _check_folder(source)
    files = [source] if is_file(source) else sorted(source.glob("*.safetensors")) or sorted(source.glob("*.bin"))
    read: dict[str, Tensor] = {}
    for file in files:
        with refusing(f"cannot read {str(file)!r}"):
            # With weights_only, a pickled file cannot run code.
            content = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
            read |= {name: weight for name, weight in content.items() if wanted(name)}
    if not files:
        raise UserError(f"{str(source)!r} has no weights: give a folder with .safetensors or .bin files")
    return read


def _loaded(kind: Any, folder: Path, config: PreTrainedConfig, **settings: Any) -> Any:
    """Return a model of a checkpoint. transformers leaves other weights in it aside."""
    with refusing(f"cannot load {str(folder)!r}"):
        model, report = kind.from_pretrained(folder, config=config, output_loading_info=True, **settings)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{str(folder)!r} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]}")
    if further := sorted(name for name in report["unexpected_keys"] if re.search(r"^(?:model\.)?layers\.\d+\.", name)):
        raise UserError(
            f"{str(folder)!r} has {len(further)} weights that its config.json does not know: {further[0]} …"
        )
    return model


def _clip(folder: Path, config: CLIPVisionConfig, checkpoint: Weights) -> nn.Module:
    """Return CLIP's vision encoder, with the tuned weights in a checkpoint of the authors, if there are any."""
    model: nn.Module = _loaded(CLIPVisionModel, folder, config)
    if tuned := weights.tuned_clip_weights(checkpoint):
        names = model.state_dict().keys()  # in some versions of transformers, they do not begin with `vision_model.`
        renamed = {name if name in names else name.removeprefix("vision_model."): tuned[name] for name in tuned}
        _load(model, {**model.state_dict(), **renamed}, "the tuned CLIP")
    return model


def _fill(model: MiniGeminiForConditionalGeneration, llm: LlamaForCausalLM, clip: nn.Module) -> None:
    """Put an LLM and CLIP into a model."""
    model.model.language_model, model.lm_head, model.model.vision_tower = llm.model, llm.lm_head, clip
    model.generation_config = llm.generation_config


def _as_one_dtype(model: PreTrainedModel) -> None:
    """Give all parts the dtype of the LLM, in which the authors run the encoders."""
    model.to(model.lm_head.weight.dtype).eval()


def _load(module: nn.Module, given: Weights, what: str) -> None:
    """Put weights into a module. Raise `UserError` if they are not its weights."""
    expected = module.state_dict()
    if missing := sorted(expected.keys() - given.keys()):
        raise UserError(f"{what} lacks {len(missing)} weights, such as {missing[0]}")
    if unknown := sorted(given.keys() - expected.keys()):
        raise UserError(f"{what} has {len(unknown)} unknown weights, such as {unknown[0]}")
    for name, weight in given.items():
        if weight.shape != expected[name].shape:
            raise UserError(
                f"{what} has {name} of shape {list(weight.shape)}, and the other parts need"
                f" {list(expected[name].shape)}: give the encoders that the checkpoint was trained with"
            )
    module.load_state_dict(given, assign=True)


# --- tokens ---------------------------------------------------------------------------------------------------------


def _add_image_token(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give tokenizer and model a token that stands for a visual token.

    New rows of the embedding are the mean of the others, so that no answer has them.
    """
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    token: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model.config.image_token_index = token
    rows = model.get_input_embeddings().weight.shape[0]
    if token < rows:
        return
    model.resize_token_embeddings(token + 1, pad_to_multiple_of=ROWS, mean_resizing=False)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[rows:] = layer.weight[:rows].float().mean(0).to(layer.weight)


def _processor(config: PreTrainedConfig, side: int, tokenizer: PreTrainedTokenizerBase) -> MiniGeminiProcessor:
    """Return the processor for images that the second encoder sees with `side` pixels per side."""
    vision, grid = config.vision_config, config.image_grid
    features, patches = side // config.aux_config.patch_size // grid, vision.image_size // vision.patch_size
    if features % patches:
        raise UserError(
            f"image_size_aux={side} gives {features} features per side of a view, which its {patches} patches per side"
            " cannot share evenly"
        )
    images = MiniGeminiImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        view_size=vision.image_size,
        image_grid=grid,
    )
    template = template_of(config.text_config.model_type, tokenizer)
    return MiniGeminiProcessor(images, tokenizer, patch_size=vision.patch_size, chat_template=template)


def _check_folder(folder: Path) -> None:
    if not is_folder(folder):
        raise UserError(f"there is no folder {str(folder)!r}: download the checkpoint first, and give its folder")
