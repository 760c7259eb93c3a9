"""Load checkpoints with transformers, and raise a one-line `UserError` for invalid ones."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from PIL import Image
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vlmzip.errors import UserError, how_to_install, refusing
from vlmzip.models import FAMILIES
from vlmzip.models.family import Family
from vlmzip.noise import silence_bitsandbytes
from vlmzip.processor import Processor
from vlmzip.runtime.prompt_text import chat_prompt, special_tokens
from vlmzip.runtime.resample import FILE as RESAMPLER

Source = str | os.PathLike[str]
silence_bitsandbytes()

#: Width and height, in pixels, of the image that tests a processor.
TRIAL = (336, 336)
#: The largest side, in pixels, that a processor may resize images to.
MOST_PIXELS = 8192
#: Settings of a generation config whose values are token ids.
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class LoadReport(TypedDict):
    """The report of transformers on the weights that it loaded."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, Sequence[int], Sequence[int]]]
    """The name of each weight, its shape in the file, and its shape in the model."""
    error_msgs: list[str]


def load_config(source: Source, **kwargs: object) -> PreTrainedConfig:
    """Return the config of a checkpoint. Raise `UserError` if it is broken or its family is not supported."""
    kwargs = {"trust_remote_code": False, **kwargs}
    with refusing(f"cannot load {str(source)!r}"):
        raw = PreTrainedConfig.get_config_dict(source, **kwargs)[0]
        if not isinstance(raw, Mapping):
            raise UserError(f"cannot load {str(source)!r}: its config.json is not a JSON object")
    _check_family(str(source), raw)
    with refusing(f"cannot load {str(source)!r}"):
        return AutoConfig.from_pretrained(source, **kwargs)


def _check_family(name: str, raw: Mapping[str, object]) -> None:
    """Raise `UserError` for an unsupported family, before transformers looks for code in the checkpoint."""
    supported = [model_type for family in FAMILIES for model_type in family.model_types]
    model_type = raw.get("model_type")
    if model_type in supported or model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return  # `family_of` tells whether a model of another family has what the default family needs
    if "vision_config" not in raw:
        raise UserError(f"{name!r} is not a vision-language model: its model type is {model_type!r}")
    raise UserError(f"vlmzip does not support the model type {model_type!r} yet; it supports: {', '.join(supported)}")


def load_processor(source: Source, config: PreTrainedConfig) -> Processor:
    """Return the processor of a checkpoint, with a pad token. Raise `UserError` if it is missing or broken."""
    with refusing(f"cannot load the processor of {str(source)!r}"):
        try:
            processor: Processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        except ImportError as error:
            if "torchvision" not in str(error).lower():
                raise
            raise UserError(
                f"{str(source)!r} takes videos, and its processor needs torchvision: {how_to_install('video')}"
            ) from error
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise UserError(
                f"{str(source)!r} has no processor for images and text: save one there with"
                " AutoProcessor.save_pretrained"
            )
    _refuse_large_images(str(source), processor.image_processor, config)
    _give_pad_token(processor.tokenizer, config)
    return processor


def _refuse_large_images(name: str, image_processor: object, config: PreTrainedConfig) -> None:
    """Raise `UserError` for a processor that would fill the memory with one image."""
    # Encoders without `image_size` take any size. Their processors limit the area of an image, not its sides.
    sides = hasattr(config.vision_config, "image_size")
    limit = MOST_PIXELS if sides else MOST_PIXELS**2
    for setting in ("size", "crop_size"):
        sizes = dict(getattr(image_processor, setting, None) or {})
        numeric = {key: value for key, value in sizes.items() if isinstance(value, int | float)}
        too_large = [key for key, value in numeric.items() if value > limit and (sides or "shortest" in key)]
        if too_large:
            raise UserError(
                f"cannot use {name!r}: its processor makes images of {setting}={sizes}, more than {limit:,}"
            )


def _give_pad_token(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Give a pad token to a tokenizer without one, such as Llama's or Mistral's.

    The attention mask hides padding, so any token of the vocabulary works, except the image placeholder. Raise
    `UserError` if the tokenizer and the model share no such token.
    """
    text = config.get_text_config()

    def usable(token: object) -> bool:
        known = isinstance(token, int) and 0 <= token < min(text.vocab_size, len(tokenizer))
        return known and token != config.image_token_id

    if usable(tokenizer.pad_token_id):
        return
    end = getattr(text, "eos_token_id", None)
    ends = end if isinstance(end, list) else [end]
    candidates = (getattr(text, "pad_token_id", None), tokenizer.eos_token_id, *ends, *range(len(tokenizer)))
    if (pad := next(filter(usable, candidates), None)) is None:
        raise UserError(
            f"the tokenizer has {len(tokenizer):,} tokens, and the config's vocab_size is {text.vocab_size}"
        )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)


def load_model(source: Source, **kwargs: Any) -> PreTrainedModel:
    """Return the model of a checkpoint; `kwargs` go to transformers.

    Raise `UserError` for pickled weights, unless `use_safetensors` is given, and for weights that do not fit the
    config: transformers would fill missing weights with random numbers and drop unexpected ones.
    """
    if "use_safetensors" not in kwargs:
        _refuse_pickles(source)
    if os.path.isdir(source) and not {"config", "subfolder"} & kwargs.keys():
        _refuse_larger_config(Path(source), load_config(source))
    forced = {"ignore_mismatched_sizes": True, "output_loading_info": True}  # report all weights that do not fit
    with refusing(f"cannot load {str(source)!r}"):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source, **{"use_safetensors": True, "trust_remote_code": False, **kwargs, **forced}
        )
    model, report = loaded
    _refuse_wrong_weights(str(source), report, mismatched=not kwargs.get("ignore_mismatched_sizes"))
    _refuse_unknown_tokens(str(source), model)
    return model


def _refuse_pickles(source: Source) -> None:
    """Raise `UserError` for a folder with only pickled weights, because reading them can run code."""
    files = sorted(os.listdir(source)) if os.path.isdir(source) else []
    pickles = [name for name in files if name.startswith("pytorch_model") and ".bin" in name]
    if pickles and not any(name.endswith(".safetensors") for name in files):
        raise UserError(
            f"{str(source)!r} has only pickled weights ({pickles[0]}), which can run code when they are read: save"
            " them as safetensors, or, if you trust their source, give --allow-pickle (use_safetensors=False in Python)"
        )


def _refuse_larger_config(folder: Path, config: PreTrainedConfig) -> None:
    """Raise `UserError` if the config describes a model much larger than the weights in the folder.

    transformers would fill the memory with random weights. `_refuse_wrong_weights` handles smaller differences, because
    it can name the weights.
    """
    packed = getattr(config, "quantization_config", None) is not None
    stored = [] if packed or (folder / "adapter_config.json").is_file() else _stored_weights(folder)
    if not stored:  # quantised, pickled, LoRA or no weights; transformers reports missing weights
        return
    parts = (config, config.get_text_config(), config.vision_config)
    layers = [getattr(part, name, 0) for part in parts for name in ("num_hidden_layers", "depth")]
    if max(layers) > len(stored):
        raise UserError(f"{str(folder)!r} has {len(stored):,} weights, and its config.json says {max(layers):,} layers")
    with refusing(f"cannot load {str(folder)!r}"), torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    expected, available = sum(weight.numel() for weight in model.parameters()), sum(stored)
    if expected > 2 * available:
        raise UserError(
            f"{str(folder)!r} has weights of {available:,} numbers, but the model of its config.json has {expected:,}:"
            " the config belongs to another model"
        )


def _stored_weights(folder: Path) -> list[int]:
    """Return the number of elements of each weight in a folder's safetensors files, except those of a resampler."""
    sizes = []
    for path in sorted(folder.glob("*.safetensors")):
        if path.name != RESAMPLER:
            with refusing(f"cannot load {str(folder)!r}: {path.name}"), safe_open(path, "pt") as file:
                sizes += [math.prod(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118
    return sizes


def _refuse_wrong_weights(name: str, report: LoadReport, *, mismatched: bool) -> None:
    """Raise `UserError` for missing weights, unexpected weights, and, if `mismatched`, weights of the wrong shape."""
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"{name!r} lacks {len(missing)} of its weights, such as {missing[0]}; download it again")
    if unexpected := sorted(report["unexpected_keys"]):
        raise UserError(
            f"{name!r} has {len(unexpected)} weights that the model of its config.json lacks, such as {unexpected[0]};"
            " the config belongs to another model"
        )
    if mismatched and report["mismatched_keys"]:
        weight, shape, expected = min(report["mismatched_keys"])
        raise UserError(
            f"{name!r} has {len(report['mismatched_keys'])} weights of another shape than in the model of its"
            f" config.json, such as {weight}: {list(shape)} instead of {list(expected)}"
        )
    if report["error_msgs"]:
        raise UserError(f"cannot load {name!r}: {report['error_msgs'][0]}")


def _refuse_unknown_tokens(name: str, model: PreTrainedModel) -> None:
    """Raise `UserError` if a token in the generation config is not a token id of the model."""
    size = model.config.get_text_config().vocab_size
    for setting in TOKENS:
        value = getattr(model.generation_config, setting, None)
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        wrong = [token for token in tokens if type(token) is not int or not -1 <= token < size]
        if wrong:
            raise UserError(
                f"cannot use {name!r}: {setting}={value!r} in its generation config; token ids are 0 to {size - 1}"
            )


def try_out(name: str, processor: Processor, family: Family) -> None:
    """Raise `UserError` if the processor's inputs for an image do not fit the model."""
    inputs = family.with_names_of_model(_trial(name, processor, family))
    rows = family.model.get_input_embeddings().weight.shape[0]
    if (largest := int(inputs["input_ids"].max())) >= rows:
        raise UserError(
            f"cannot use {name!r}: its tokenizer writes the token {largest}, but the model has {rows:,} tokens"
        )
    if missing := [key for key in family.image_inputs if key not in inputs]:
        raise UserError(f"cannot use {name!r}: its processor makes no {', '.join(missing)}")
    tokens, placeholders = family.plain_counts(inputs)[0], int((inputs["input_ids"] == family.placeholder_id).sum())
    if tokens != placeholders:
        raise UserError(
            f"cannot use {name!r}: its processor writes {placeholders} placeholders for an image of {tokens} visual"
            " tokens"
        )


def refuse_if_it_cannot_answer(name: str, processor: Processor, family: Family) -> None:
    """Raise `UserError` if the model cannot answer about an image without compression.

    This generates an uncompressed answer of at most 2 tokens.
    """
    inputs = _trial(name, processor, family).to(family.model.device, family.model.dtype)
    quantised = getattr(family.model.config, "quantization_config", None)
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    weights = f", with weights quantised by {getattr(method, 'value', method)} on {family.model.device}"
    with refusing(f"{name!r} cannot answer, not even without compression{weights if quantised else ''}"):
        family.model.generate(**inputs, max_new_tokens=2, do_sample=False)


def _trial(name: str, processor: Processor, family: Family) -> BatchFeature:
    """Return the model inputs of a prompt about one image."""
    try:
        text = chat_prompt(family, processor, "", 1)
    except UserError as error:
        raise UserError(f"cannot use {name!r}: {error}") from error
    special = special_tokens(processor.tokenizer, text)
    with refusing(f"cannot use {name!r}: its processor refuses an image"):
        return processor(images=[Image.new("RGB", TRIAL)], text=text, return_tensors="pt", **special)
