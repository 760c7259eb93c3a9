"""Before the LLM: encode the images, compress their tokens, shorten the prompt. Data in, data out; no hook stays."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Int
from torch import Tensor, nn

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models import family_of
from vlmzip.models.family import Family
from vlmzip.processor import Inputs
from vlmzip.runtime.cache import cache_of
from vlmzip.runtime.compressed_inputs import CompressedInputs
from vlmzip.runtime.packing import pack
from vlmzip.runtime.prompt import (
    PER_TOKEN,
    Span,
    find_placeholders,
    gather,
    pad_id,
    prompt_in,
    refuse_placeholders_without_images,
    refuse_unknown_tokens,
    shorten,
)
from vlmzip.runtime.report import CompressedImage, Report, Stopwatch
from vlmzip.runtime.stages import compress_images
from vlmzip.runtime.versions import check_takes
from vlmzip.visual_tokens import Site


def compress_inputs(
    model: nn.Module,
    inputs: Inputs,
    compressor: Compressor,
    *,
    generating: bool = False,
    family: Family | None = None,
    resampler: nn.Module | None = None,
    pack_rows: bool = False,
) -> CompressedInputs:
    """Replace the images in `inputs` by their compressed visual tokens, and shorten the prompt to match.

    `inputs` are what the processor returns, with labels or generation arguments if you like; what is not about the
    prompt or the images is passed through. The result goes into the plain model's `model(**...)`, or with
    `generating=True` into `model.generate(**...)` (a family may count positions differently there).

    In the result, `mm_encoder_outputs` stands in place of the images: its `["image"].pooler_output` holds the projected
    tokens, `[after, llm_dim]` for each image in a list, or `[1, all, llm_dim]` in families that take one tensor.
    `input_ids`, `attention_mask`, labels and token types are `[batch, new_length]`, with a placeholder for each token
    left. Rows may end up with different numbers of tokens: they are padded again, on the side that was padded.

    `position_ids` are there where tokens keep their positions, where positions have several axes, or where you give
    them: those are kept, whatever the compressor's `positions`. Elsewhere the model counts. Where tokens keep
    positions, an image's tokens stand in the order of their anchors, so that positions ascend; contiguous ones are
    counted in the compressor's own order.

    Compressors inside the LLM do not act here, and nothing warns of prompts beyond the LLM's positions: that is
    `vlmzip.attach`. docs/using.md shows how to feed another engine.

    With `pack_rows`, which is for training without a cache, short rows stand side by side in one where they can (see
    `packing.py`): loss and gradients stay the same, logits are of the packed rows.

    A method with weights needs `resampler`, the module that holds them: the façade's attribute of this name.

    Raise `UserError` where placeholders and images do not match.
    """
    family = family or family_of(model)
    out = CompressedInputs(inputs)
    watch = Stopwatch(next(model.parameters()).device)
    if inputs.get("pixel_values_videos") is not None:
        warnings.warn("videos go through uncompressed: this version compresses images", stacklevel=2)
    if inputs.get(family.image_inputs[0]) is None:
        refuse_placeholders_without_images(family, inputs)
        out.report, out.spans = Report(compressor, [], None, watch), []
        return out

    ids, mask = prompt_in(inputs)
    refuse_unknown_tokens(family, ids)
    if len(inputs[family.image_inputs[0]]) == 0:
        raise UserError(f"{family.image_inputs[0]} is empty; leave it out where there are no images")
    given = inputs.get("position_ids") is not None
    original = given or positions_of(compressor, family) == "original"
    images, out.smaller = compress_images(family, inputs, compressor, watch, resampler, ascending=original)
    found = find_placeholders(ids, family.placeholder_id, [image.report.before for image in images])
    source = shorten(mask, found, [image.places for image in images], ascending=original)

    for name in family.image_inputs:
        out.pop(name, None)
    check_takes(family.model, "mm_encoder_outputs")
    out["mm_encoder_outputs"] = family.encoder_outputs(
        [image.features for image in images], [image.streams for image in images]
    )
    out["input_ids"] = gather(ids, source, pad_id(family))
    out["attention_mask"] = gather(mask, source, PER_TOKEN["attention_mask"])
    if original and not given:
        positions, _ = family.original_positions({**inputs, "input_ids": ids}, mask)
        out["position_ids"] = positions if generating else family.forward_positions(positions)
    counted = out.get("position_ids") is None
    for name in PER_TOKEN.keys() - {"attention_mask"}:
        if out.get(name) is not None:
            if out[name].ndim < 2 or out[name].shape[-1] != ids.shape[1]:
                raise UserError(f"{name} must be [batch, length] as input_ids; got shape {tuple(out[name].shape)}")
            out[name] = gather(out[name], source, PER_TOKEN[name])
    if counted and family.position_axes and (generating or out.smaller is not None):
        # Left to itself, `generate` would leave the positions' offsets on the model, for others to stumble over.
        out["position_ids"] = contiguous_positions(family, out, out["attention_mask"])[0]
    reports = [replace(image.report, row=row) for image, (row, _) in zip(images, found, strict=True)]
    out.report = Report(compressor, reports, source, watch)
    goes_on = any(stage.site is Site.IN_LLM for stage in compressor.stages())
    out.spans = _spans(out["input_ids"], family.placeholder_id, images) if goes_on else []
    if pack_rows and not goes_on and not generating and cache_of(out) is None:
        pack(out, family, images, {"input_ids": pad_id(family), **PER_TOKEN})
    return out


def _spans(ids: Int[Tensor, "batch length"], placeholder_id: int, images: Sequence[CompressedImage]) -> list[Span]:
    """Where the images stand in the shortened prompt."""
    found = find_placeholders(ids, placeholder_id, [image.report.after for image in images])
    return [
        Span(row, columns, image.left, len(image.report.layout.views))
        for (row, columns), image in zip(found, images, strict=True)
    ]


def positions_of(compressor: Compressor, family: Family) -> str:
    """The policy for kept positions: the compressor's own, or what the papers use in this family."""
    return compressor.positions or compressor.stages()[0].default_positions or family.default_positions


def contiguous_positions(
    family: Family, compressed: CompressedInputs, mask: Int[Tensor, "batch length"]
) -> tuple[Int[Tensor, "*axes batch length"], Int[Tensor, " batch"]]:
    """Positions of the compressed prompt, counted from 0 as `generate` does, and the position of each next token.

    One after another on every axis; smaller images keep a grid, which the family counts as it counts any other.
    """
    if compressed.smaller is not None:
        return family.original_positions({**compressed.smaller, "input_ids": compressed["input_ids"]}, mask)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return positions.expand(*family.position_axes, *mask.shape), mask.sum(-1)
