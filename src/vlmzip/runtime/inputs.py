"""Compression before the LLM: encode the images, compress their tokens and shorten the prompt, without hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models import family_of
from vlmzip.models.family import Family
from vlmzip.processor import Inputs
from vlmzip.runtime.cache_names import cache_of
from vlmzip.runtime.compressed_inputs import CompressedInputs
from vlmzip.runtime.earlier_images import ARGUMENT as EARLIER
from vlmzip.runtime.earlier_images import EarlierImages
from vlmzip.runtime.fitting import inside_the_llm
from vlmzip.runtime.packing import pack
from vlmzip.runtime.prompt import (
    PER_TOKEN,
    Span,
    find_placeholders,
    gather,
    pad_id,
    prompt_in,
    refuse_placeholders_without_images,
    shorten,
)
from vlmzip.runtime.report import CompressedImage, Report, Stopwatch
from vlmzip.runtime.stages import compress_images, encoder_outputs
from vlmzip.runtime.versions import check_takes


def compress_inputs(
    model: nn.Module,
    inputs: Inputs,
    compressor: spec.CompressorLike,
    *,
    generating: bool = False,
    family: Family | None = None,
    resampler: nn.Module | None = None,
    pack_rows: bool = False,
    longest: int | None = None,
) -> CompressedInputs:
    """Replace images and videos in `inputs` with their compressed visual tokens, and shorten the prompt to match.

    `inputs` are the processor's outputs, optionally with labels or generation arguments. Inputs that do not belong to
    the prompt or the images pass through unchanged. `compressor` may be text or a path, as in `attach`. Call the plain
    model on the result: `model(**...)`, or `model.generate(**...)` after `generating=True`, because a family may count
    positions differently there. Beams and several sequences per prompt need transformers 5.19 or later: older versions
    give copies of a row wrong images.

    In the result, `mm_encoder_outputs` replaces the images and videos. Its `["image"].pooler_output` (and `["video"]`)
    holds the projected tokens: a list with `[after, llm_dim]` for each image, or `[all, 1, llm_dim]` in families that
    take one tensor. `input_ids`,
    `attention_mask`, labels and token types are `[batch, new_length]`, with one placeholder for each remaining token.
    Rows of different lengths are padded, on the right if the prompt was padded there, else on the left.

    The result has `position_ids` if tokens keep their positions, or if `inputs` has them: given positions are kept,
    whatever the compressor's `positions`. If positions have several axes, it also has them with `generating` or with a
    compressor that resizes images. Otherwise the model counts positions. If tokens keep positions, an image's tokens
    are in the order of their anchors, so that positions ascend. Contiguous positions follow the compressor's order.

    Compressors inside the LLM do not act here, and there is no warning about prompts beyond the LLM's positions; use
    `vlmzip.attach` for both. docs/using.md shows how to pass the result to another engine.

    `pack_rows` is for training without a cache. It joins short rows into one row where this saves computation (see
    `packing.py`) and sets `position_ids` in place of `attention_mask`. Loss and gradients stay the same; logits belong
    to the packed rows.

    `longest` is for training, too: rows that are longer after compression lose their labels, so that nothing is learned
    from them. `report.too_long` has their numbers.

    A method with weights needs `resampler`, the module that holds them, such as the façade's `resampler`.

    `inputs` can have images that were compressed earlier (`EarlierImages`) as `compressed_images` in place of pixels.
    The prompt has their uncompressed placeholders, and the vision encoder does not run.

    Raise `UserError` if placeholders and images do not match.
    """
    family, compressor = family or family_of(model), spec.as_compressor(compressor)
    inputs = family.with_names_of_model(inputs)
    out = CompressedInputs(inputs)
    earlier: EarlierImages | None = out.pop(EARLIER, None)
    if earlier is not None:
        inputs = earlier.described_in(inputs, family, compressor)
    watch = Stopwatch(next(model.parameters()).device)
    present = family.present_in(inputs)
    if not present:
        refuse_placeholders_without_images(family, inputs)
        out.report, out.spans = Report(compressor, [], None, watch), []
        return out

    ids, mask = prompt_in(inputs)
    refuse_placeholders_without_images(family, inputs)
    for each in present:
        if len(inputs[name := each.image_inputs[0]]) == 0:
            raise UserError(f"{name} is empty; leave it out where there are no {each.modality}s")
    has_positions = inputs.get("position_ids") is not None
    original = has_positions or positions_of(compressor, family) == "original"
    images: list[CompressedImage] = []
    if earlier is not None:
        images, out.smaller = list(earlier.images), earlier.smaller
    for each in present if earlier is None else ():
        of_kind, smaller = compress_images(
            each, out.smaller or inputs, compressor, watch, resampler, ascending=original
        )
        images += of_kind
        out.smaller = smaller or out.smaller
    places = _places(present, ids, images, [image.report.before for image in images])
    in_order = sorted(range(len(images)), key=lambda n: (places[n][0], places[n][1][0]))
    images, places = [images[n] for n in in_order], [places[n] for n in in_order]
    in_place = [original or image.report.layout.is_video for image in images]
    source = shorten(mask, places, [image.places for image in images], in_place)

    for name in (name for each in present for name in each.image_inputs):
        out.pop(name, None)
    check_takes(family.model, "mm_encoder_outputs")
    out["mm_encoder_outputs"] = encoder_outputs(family, images)
    out["input_ids"] = gather(ids, source, pad_id(family))
    out["attention_mask"] = gather(mask, source, PER_TOKEN["attention_mask"])
    if original and not has_positions:
        out.counted = positions, _ = family.original_positions({**inputs, "input_ids": ids}, mask)
        out["position_ids"] = positions if generating else family.forward_positions(positions)
    counted = out.get("position_ids") is None
    for name in PER_TOKEN.keys() - {"attention_mask"}:
        if out.get(name) is not None:
            if out[name].ndim < 2 or out[name].shape[-1] != ids.shape[1]:
                raise UserError(f"{name} must be [batch, length] as input_ids; got shape {tuple(out[name].shape)}")
            out[name] = gather(out[name], source, PER_TOKEN[name])
    if counted and family.position_axes and (generating or out.smaller is not None):
        # Without `position_ids`, `generate` would store position offsets on the model, which could affect later calls.
        out.counted = contiguous_positions(family, out, out["attention_mask"])
        out["position_ids"] = out.counted[0]
    too_long = _without_labels_beyond(longest, out)
    reports = [replace(image.report, row=row) for image, (row, _) in zip(images, places, strict=True)]
    out.report = Report(compressor, reports, source, watch, too_long=too_long)
    acts_inside = bool(inside_the_llm(compressor))
    out.spans = _spans(present, out["input_ids"], images) if acts_inside else []
    if pack_rows and not acts_inside and not generating and cache_of(out) is None:
        pack(out, family, images, {"input_ids": pad_id(family), **PER_TOKEN})
    return out


def _without_labels_beyond(longest: int | None, compressed: CompressedInputs) -> list[int]:
    """Remove the labels of rows with more than `longest` tokens, in place, and return the numbers of these rows."""
    labels = compressed.get("labels")
    if longest is None or labels is None:
        return []
    beyond = (compressed["attention_mask"].sum(1) > longest) & (labels != PER_TOKEN["labels"]).any(1)
    compressed["labels"] = labels.masked_fill(beyond[:, None], PER_TOKEN["labels"])
    return beyond.nonzero()[:, 0].tolist()


def _places(
    families: Sequence[Family], ids: Int[Tensor, "batch length"], images: Sequence[CompressedImage], counts: list[int]
) -> list[tuple[int, list[int]]]:
    """Return the row and the placeholder columns of each image and video; each has `counts` placeholders in `ids`."""
    places: dict[int, tuple[int, list[int]]] = {}
    for family in families:
        mine = [n for n, image in enumerate(images) if image.report.modality == family.modality]
        of_kind = find_placeholders(ids, family.placeholder_id, [counts[n] for n in mine], family.modality)
        places |= dict(zip(mine, of_kind, strict=True))
    return [places[n] for n in range(len(images))]


def _spans(
    families: Sequence[Family], ids: Int[Tensor, "batch length"], images: Sequence[CompressedImage]
) -> list[Span]:
    """Return the places of the images in the shortened prompt."""
    places = _places(families, ids, images, [image.report.after for image in images])
    return [
        Span(row, columns, image.left, len(image.report.layout.views), _frames_of(image))
        for (row, columns), image in zip(places, images, strict=True)
    ]


def _frames_of(image: CompressedImage) -> list[int] | None:
    """Return the frame of each remaining placeholder of a video; `None` for images."""
    layout = image.report.layout
    return layout.frame_of(torch.tensor(image.places)).tolist() if layout.is_video else None


def positions_of(compressor: Compressor, family: Family) -> str:
    """Return the position policy: the compressor's own, else its first stage's default, else the family's."""
    return compressor.positions or compressor.stages()[0].default_positions or family.default_positions


def contiguous_positions(
    family: Family, compressed: CompressedInputs, mask: Int[Tensor, "batch length"]
) -> tuple[Int[Tensor, "*axes batch length"], Int[Tensor, " batch"]]:
    """Return the positions of the compressed prompt, counted from 0, and the position of each row's next token.

    On every axis, each token's position is one more than that of the token before. With resized images, the family
    counts the positions, because their tokens still lie on a grid.
    """
    if compressed.smaller is not None:
        return family.original_positions({**compressed.smaller, "input_ids": compressed["input_ids"]}, mask)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return positions.expand(*family.position_axes, *mask.shape), mask.sum(-1)
