"""Before the LLM: encode the images, compress their tokens, shorten the prompt. Data in, data out; no hook stays."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.methods import NoCompression
from vlmzip.models import adapter_for
from vlmzip.models.adapter import ModelAdapter
from vlmzip.resampler import Resampler
from vlmzip.runtime.cache import cache_of
from vlmzip.runtime.packing import pack
from vlmzip.runtime.pixels import encode_smaller
from vlmzip.runtime.report import CompressedImage, ImageReport, Report, Stopwatch
from vlmzip.runtime.resample import resample_images
from vlmzip.runtime.versions import check_takes
from vlmzip.visual_tokens import Grid, Site, VisualTokens

#: Inputs with one value per token of the prompt, and the value that padding gets. `input_ids` gets the pad token.
PER_TOKEN = {"attention_mask": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0, "position_ids": 0}


@dataclass(frozen=True)
class Span:
    """Where the visual tokens of one image stand in the prompt that the LLM gets."""

    row: int
    columns: list[int]
    grid: Grid | None
    """`None` where they lie on no grid any more."""
    prefix: int = 0


class CompressedInputs(dict[str, Any]):
    """Inputs for the model's own `forward` or `generate`, with the `report` of what was done to the images."""

    report: Report
    spans: list[Span]
    """Where the images' tokens stand in the shortened prompt; only for compressors that go on inside the LLM."""
    smaller: Mapping[str, Any] | None = None
    """The inputs with smaller images in them, where the encoder saw such."""


def compress_inputs(
    model: nn.Module,
    inputs: Mapping[str, Any],
    compressor: Compressor,
    *,
    generating: bool = False,
    adapter: ModelAdapter | None = None,
    resampler: nn.Module | None = None,
    pack_rows: bool = False,
) -> CompressedInputs:
    """Replaces the images in `inputs` by their compressed visual tokens, and shortens the prompt to match.

    `inputs` are what the processor returns, with labels or generation arguments if you like; what is not about the
    prompt or the images is passed through. The result goes into the plain model's `model(**...)`, or with
    `generating=True` into `model.generate(**...)` (a family may count positions differently there). Rows may end up
    with different numbers of tokens: they are padded again, on the side that was padded. Position ids that you give
    yourself are kept, whatever the compressor's `positions`. Where tokens keep positions, an image's tokens stand in
    the order of their anchors, so that positions ascend; contiguous ones are counted in the compressor's own order.
    What acts inside the LLM does not act here: for that there is `vlmzip.attach`.

    With `pack_rows`, which is for training without a cache, short rows stand side by side in one where they can (see
    `packing.py`): loss and gradients stay the same, logits are of the packed rows.

    A method with weights needs `resampler`, the module that holds them: the façade's attribute of this name.

    Raises `UserError` where placeholders and images do not match.
    """
    adapter = adapter or adapter_for(model)
    out = CompressedInputs(inputs)
    watch = Stopwatch(next(model.parameters()).device)
    if inputs.get("pixel_values_videos") is not None:
        warnings.warn("videos go through uncompressed: this version compresses images", stacklevel=2)
    if inputs.get(adapter.image_inputs[0]) is None:
        _refuse_placeholders_without_images(adapter, inputs)
        out.report, out.spans = Report(compressor, [], None, watch), []
        return out

    ids, mask = _prompt(inputs)
    _refuse_unknown_tokens(adapter, ids)
    if len(inputs[adapter.image_inputs[0]]) == 0:
        raise UserError(f"{adapter.image_inputs[0]} is empty; leave it out where there are no images")
    given = inputs.get("position_ids") is not None
    original = given or positions_of(compressor, adapter) == "original"
    images, out.smaller = compress_images(adapter, inputs, compressor, watch, resampler, ascending=original)
    places = find_placeholders(ids, adapter.placeholder_id, [image.report.before for image in images])
    source = shorten(mask, places, [image.offsets for image in images], ascending=original)

    for name in adapter.image_inputs:
        out.pop(name, None)
    check_takes(adapter.model, "mm_encoder_outputs")
    out["mm_encoder_outputs"] = adapter.encoder_outputs([image.features for image in images])
    out["input_ids"] = gather(ids, source, pad_id(adapter))
    out["attention_mask"] = gather(mask, source, PER_TOKEN["attention_mask"])
    if original and not given:
        positions, _ = adapter.original_positions({**inputs, "input_ids": ids}, mask)
        out["position_ids"] = positions if generating else adapter.forward_positions(positions)
    counted = out.get("position_ids") is None
    for name in PER_TOKEN.keys() - {"attention_mask"}:
        if out.get(name) is not None:
            if out[name].ndim < 2 or out[name].shape[-1] != ids.shape[1]:
                raise UserError(f"{name} must be [batch, length] as input_ids; got shape {tuple(out[name].shape)}")
            out[name] = gather(out[name], source, PER_TOKEN[name])
    if counted and adapter.position_axes and (generating or out.smaller is not None):
        # Left to itself, `generate` would leave the positions' offsets on the model, for others to stumble over.
        out["position_ids"] = contiguous_positions(adapter, out, out["attention_mask"])[0]
    reports = [replace(image.report, row=row) for image, (row, _) in zip(images, places, strict=True)]
    out.report = Report(compressor, reports, source, watch)
    goes_on = any(stage.site is Site.IN_LLM for stage in compressor.stages())
    out.spans = _spans(out["input_ids"], adapter.placeholder_id, reports) if goes_on else []
    if pack_rows and not goes_on and not generating and cache_of(out) is None:
        pack(out, adapter, images, {"input_ids": pad_id(adapter), **PER_TOKEN})
    return out


def _spans(ids: Int[Tensor, "batch length"], placeholder_id: int, images: Sequence[ImageReport]) -> list[Span]:
    """Where the images stand in the shortened prompt."""
    places = find_placeholders(ids, placeholder_id, [image.after for image in images])
    return [Span(row, columns, *left_on_grid(image)) for (row, columns), image in zip(places, images, strict=True)]


def left_on_grid(image: ImageReport) -> tuple[Grid | None, int]:
    """The grid on which an image's tokens still lie, and the tokens before it."""
    if image.grid is None or image.token_map is None or image.after != image.before:
        return None, 0
    return image.grid, image.before - image.grid.size


def positions_of(compressor: Compressor, adapter: ModelAdapter) -> str:
    """The policy for kept positions: the compressor's own, or what the papers use in this family."""
    return compressor.positions or compressor.stages()[0].default_positions or adapter.default_positions


def contiguous_positions(
    adapter: ModelAdapter, compressed: CompressedInputs, mask: Int[Tensor, "batch length"]
) -> tuple[Int[Tensor, "*axes batch length"], Int[Tensor, " batch"]]:
    """Positions of the compressed prompt, counted from 0 as `generate` does, and the position of each next token.

    One after another on every axis; smaller images keep a grid, which the family counts as it counts any other.
    """
    if compressed.smaller is not None:
        return adapter.original_positions({**compressed.smaller, "input_ids": compressed["input_ids"]}, mask)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return positions.expand(*adapter.position_axes, *mask.shape), mask.sum(-1)


def compress_images(
    adapter: ModelAdapter,
    inputs: Mapping[str, Any],
    compressor: Compressor,
    watch: Stopwatch,
    resampler: nn.Module | None,
    *,
    ascending: bool = False,
) -> tuple[list[CompressedImage], Mapping[str, Any] | None]:
    """Encodes, selects, applies and projects; the projector sees nothing but what is left.

    With it the inputs that the encoder saw, where its images were made smaller. `ascending`: tokens keep positions,
    so each compressor's output tokens stand in the order of their anchors, not in its own.
    """
    first, *later = [stage for stage in compressor.stages() if stage.site is not Site.IN_LLM] or [NoCompression()]
    smaller = None
    if isinstance(first, Resampler):
        images = resample_images(adapter, inputs, first, resampler, watch)
    elif first.site is Site.PIXELS:
        images, smaller = encode_smaller(adapter, inputs, first, watch)
    else:
        images = _encode_and_compress(adapter, inputs, first, watch)

    def ordered(some: list[CompressedImage]) -> list[CompressedImage]:
        with watch.time("bookkeeping"):
            return [image.in_order_of_positions() for image in some] if ascending else some

    images = ordered(images)
    for stage in later:
        with watch.time("selection"):
            images = [_compress_projected(stage, image) for image in images]
        images = ordered(images)
    return images, smaller


def _compress_projected(compressor: Compressor, image: CompressedImage) -> CompressedImage:
    """What a second compressor, behind the projector, makes of one image."""
    grid, prefix = left_on_grid(image.report)
    token_map = compressor(VisualTokens(image.features[None], grid, prefix, passes_prefix=True))
    count = token_map.lengths[0]
    if count == 0:
        raise UserError(f"{compressor.name()} left no token of an image; it must keep at least one")
    before = image.report.token_map
    report = replace(
        image.report,
        after=count,
        by_layer=(count,) * len(image.report.by_layer),
        token_map=before and before.then(token_map),
    )
    anchors = token_map.anchor_index()[0].tolist()
    return CompressedImage(token_map.apply(image.features[None])[0], [image.offsets[a] for a in anchors], report)


def _encode_and_compress(
    adapter: ModelAdapter, inputs: Mapping[str, Any], compressor: Compressor, watch: Stopwatch
) -> list[CompressedImage]:
    """The images behind the projector, through the first compressor before the LLM."""
    site = compressor.site
    with watch.time("encoder"):
        groups = adapter.encode(inputs, site, compressor.needs)
    found: dict[int, CompressedImage] = {}
    for tokens, indices in groups:
        with watch.time("selection"):
            token_map = compressor(tokens)
            kept = token_map.apply(tokens.features)
        lengths = token_map.lengths
        if 0 in lengths:
            raise UserError(f"{compressor.name()} left no token of an image; it must keep at least one")
        with watch.time("projector"):
            flat = torch.cat([row[:length] for row, length in zip(kept, lengths, strict=True)])
            projected = adapter.project(flat, site).split(lengths)
        with watch.time("bookkeeping"):
            anchors = token_map.anchor_index().tolist()
        hidden = tokens.features.shape[1] - tokens.plain_count
        for place, index in enumerate(indices):
            # A token outside the grid (CLS) has no placeholder of its own: it takes the position of the first.
            offsets = [max(anchor - hidden, 0) for anchor in anchors[place][: lengths[place]]]
            report = ImageReport(
                row=-1,
                before=tokens.plain_count,
                after=lengths[place],
                by_layer=(lengths[place],) * len(adapter.decoder_layers),
                token_map=token_map.rows(slice(place, place + 1)),
                grid=tokens.grid,
                prefix=tokens.prefix,
                features=tokens.features[place].detach(),
            )
            found[index] = CompressedImage(projected[place], offsets, report)
    return [found[index] for index in sorted(found)]


def find_placeholders(
    ids: Int[Tensor, "batch length"], placeholder_id: int, counts: Sequence[int]
) -> list[tuple[int, list[int]]]:
    """For each image its row and the columns of its placeholders, in order of appearance.

    `counts` are the images' visual tokens. Raises `UserError` where they do not fill the placeholders, row by row.
    """
    columns_of = [(row == placeholder_id).nonzero()[:, 0].tolist() for row in ids.cpu()]
    total = sum(map(len, columns_of))
    if total != sum(counts):
        raise UserError(
            f"the prompt has {total} image placeholders, but its {len(counts)} image(s) have {sum(counts)} visual"
            " tokens; use the model's own processor, and one <image> for each image"
        )
    places: list[tuple[int, list[int]]] = []
    row = used = 0
    for count in counts:
        while used == len(columns_of[row]):
            row, used = row + 1, 0
        columns = columns_of[row][used : used + count]
        if len(columns) < count:
            raise UserError(
                f"row {row} of the prompt ends in the middle of an image: {len(columns)} of {count} placeholders"
            )
        places.append((row, columns))
        used += count
    return places


def shorten(
    mask: Int[Tensor, "batch length"],
    places: Sequence[tuple[int, list[int]]],
    offsets: Sequence[Sequence[int]],
    *,
    ascending: bool = False,
) -> Int[Tensor, "batch new_length"]:
    """Where each position of the shortened prompt comes from; -1 for padding.

    The tokens left of an image stand where its first placeholder stood, and what stands among its placeholders behind
    them; an offset names the placeholder of each. `ascending`: all of them stand in the order of the prompt.
    """
    attended = mask.cpu().bool()
    kept_rows: list[list[int]] = []
    for row in range(len(mask)):
        columns = attended[row].nonzero()[:, 0]
        first, last = (int(columns[0]), int(columns[-1])) if len(columns) else (0, -1)
        kept: list[int] = []
        at = first
        for (place_row, placeholders), image_offsets in zip(places, offsets, strict=True):
            if place_row == row:
                dropped = set(placeholders)
                kept += range(at, placeholders[0])
                left = [placeholders[offset] for offset in image_offsets]
                left += [column for column in range(placeholders[0], placeholders[-1]) if column not in dropped]
                kept += sorted(left) if ascending else left
                at = placeholders[-1] + 1
        kept_rows.append(kept + list(range(at, last + 1)))
    longest = max(map(len, kept_rows))
    pad_right = bool((~attended[:, -1]).any())
    padded = [
        row + [-1] * (longest - len(row)) if pad_right else [-1] * (longest - len(row)) + row for row in kept_rows
    ]
    return torch.tensor(padded, dtype=torch.long, device=mask.device)


def gather(
    values: Int[Tensor, "*axes _ length"], source: Int[Tensor, "batch new_length"], fill: int
) -> Int[Tensor, "*axes batch new_length"]:
    """`values` at `source`, `fill` where that is -1."""
    shape = (*values.shape[:-2], len(source))
    index = source.clamp(min=0).expand(*shape, -1)
    return values.expand(*shape, -1).gather(-1, index).masked_fill(source < 0, fill)


def pad_id(adapter: ModelAdapter) -> int:
    """The token that stands where there is none; some configs say -1, which has no embedding."""
    pad = getattr(adapter.llm_config, "pad_token_id", None)
    return 0 if pad is None else max(pad, 0)


def _prompt(inputs: Mapping[str, Any]) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    if ids is None:
        raise UserError("give input_ids together with the images: vlmzip finds an image's place by its placeholders")
    if inputs.get("inputs_embeds") is not None:
        raise UserError("give input_ids or inputs_embeds, not both, with images: embeddings have no placeholders")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise UserError(f"input_ids must be a tensor [batch, length]; got {getattr(ids, 'shape', type(ids).__name__)}")
    if mask is not None and mask.shape != ids.shape:
        wanted = f"{list(ids.shape)} as input_ids"
        raise UserError(f"attention_mask must be [batch, length] with images: {wanted}; got {list(mask.shape)}")
    return ids, torch.ones_like(ids) if mask is None else mask


def _refuse_placeholders_without_images(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> None:
    ids = inputs.get("input_ids")
    if ids is None or inputs.get("mm_encoder_outputs"):
        return
    if bool((ids == adapter.placeholder_id).any()):
        raise UserError(f"the prompt has image placeholders, but there is no {adapter.image_inputs[0]}")
    _refuse_unknown_tokens(adapter, ids)


def _refuse_unknown_tokens(adapter: ModelAdapter, ids: Int[Tensor, "batch length"]) -> None:
    """Raise `UserError` for tokens without an embedding; families replace placeholders before they look them up."""
    rows = adapter.model.get_input_embeddings().num_embeddings
    unknown = ids[(ids != adapter.placeholder_id) & ((ids < 0) | (ids >= rows))]
    if len(unknown):
        raise UserError(
            f"the prompt has the token {int(unknown[0])}, and the model knows tokens 0 to {rows - 1}:"
            " use the model's own tokenizer"
        )
