"""Prompts about stored images: token ids and inputs like those of the model's processor, without pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models.family import Family
from vlmzip.processor import InputDict, Processor
from vlmzip.runtime.earlier_images import ARGUMENT, EarlierImages
from vlmzip.runtime.prompt import PER_TOKEN, pad_id
from vlmzip.runtime.prompt_text import special_tokens
from vlmzip.serving.store.image import Described, StoredImage


def stored_inputs(
    family: Family,
    processor: Processor,
    compressor: Compressor,
    prompts: Sequence[str],
    images: Sequence[Sequence[StoredImage]],
) -> InputDict:
    """Return the inputs of prompts about stored images, for an attached model's `forward` or `generate`.

    `prompts` come from the model's chat template, `images` has the images of each prompt, and `compressor` made their
    tokens. The inputs are those of the processor, with `compressed_images` in place of pixels. Rows are padded on the
    side that the tokenizer's `padding_side` names. Raise `UserError` if placeholders and images do not match.
    """
    rows = [
        _with_images(ids, family.placeholder_id, of_prompt)
        for ids, of_prompt in zip(text_ids(processor, prompts), images, strict=True)
    ]
    side = processor.tokenizer.padding_side
    device, dtype = family.model.device, family.model.dtype
    inputs: InputDict = {}
    for name in rows[0]:
        fill = pad_id(family) if name == "input_ids" else PER_TOKEN.get(name, 0)
        inputs[name] = pad_sequence([row[name] for row in rows], True, fill, side).to(device)
    every = [image for of_prompt in images for image in of_prompt]
    if every:
        layers = len(family.decoder_layers)
        smaller = [image.smaller for image in every if image.smaller is not None]
        inputs[ARGUMENT] = EarlierImages(
            [image.compressed(layers, device, dtype) for image in every],
            _joined(family, [image.described for image in every]),
            compressor,
            _joined(family, smaller) if smaller else None,
        )
    return inputs


def text_ids(processor: Processor, prompts: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each prompt, with one placeholder for each image."""
    special = special_tokens(processor.tokenizer, prompts[0])  # all prompts come from the same template
    ids: list[list[int]] = processor.tokenizer(list(prompts), **special)["input_ids"]
    return ids


def _with_images(ids: Sequence[int], placeholder: int, images: Sequence[StoredImage]) -> dict[str, Tensor]:
    """Return a prompt's inputs with one value per token. Each placeholder in `ids` becomes the part of an image."""
    if ids.count(placeholder) != len(images):
        raise UserError(
            f"the prompt has {ids.count(placeholder)} image placeholders, but there are {len(images)} stored images"
        )
    remaining = iter(images)
    parts = [next(remaining).prompt if token == placeholder else {"input_ids": torch.tensor([token])} for token in ids]
    names = dict.fromkeys(name for part in parts for name in part)
    row = {
        # Token types of text are 0.
        name: torch.cat([part[name] if name in part else torch.zeros_like(part["input_ids"]) for part in parts]).long()
        for name in names
    }
    return {**row, "attention_mask": torch.ones_like(row["input_ids"])}


def _joined(family: Family, images: Sequence[Described]) -> InputDict:
    """Return the image inputs of all images together. The pixels are on the device meta: they have no values."""
    pixels, *_ = family.image_inputs
    names = images[0].inputs
    inputs = {name: torch.cat([image.inputs[name] for image in images]).to(family.model.device) for name in names}
    count, rest = sum(image.pixels[0] for image in images), images[0].pixels[1:]
    return {**inputs, pixels: torch.empty(count, *rest, device="meta")}
