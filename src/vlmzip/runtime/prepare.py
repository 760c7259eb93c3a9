"""Before the LLM: encode the pictures, compress their tokens, shorten the prompt. Data in, data out; no hook stays."""

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
from vlmzip.runtime.report import CompressedPicture, PictureReport, Report, Stopwatch
from vlmzip.runtime.resample import resample_pictures
from vlmzip.runtime.versions import check_takes
from vlmzip.visual_tokens import Grid, Site, VisualTokens

#: Inputs with one value per token of the prompt, and the value that padding gets. `input_ids` gets the pad token.
PER_TOKEN = {"attention_mask": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0, "position_ids": 0}


@dataclass(frozen=True)
class Span:
    """Where the visual tokens of one picture stand in the prompt that the LLM gets."""

    row: int
    columns: list[int]
    grid: Grid | None
    """`None` where they lie on no grid any more."""
    prefix: int = 0


class CompressedInputs(dict[str, Any]):
    """Inputs for the model's own `forward` or `generate`, with the `report` of what was done to the pictures."""

    report: Report
    spans: list[Span]
    """Where the pictures' tokens stand in the shortened prompt; only for compressors that go on inside the LLM."""
    smaller: Mapping[str, Any] | None = None
    """The inputs with smaller pictures in them, where the encoder saw such."""


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
    """Replaces the pictures in `inputs` by their compressed visual tokens, and shortens the prompt to match.

    `inputs` are what the processor returns, with labels or generation arguments if you like; what is not about the
    prompt or the pictures is passed through. The result goes into the plain model's `model(**...)`, or with
    `generating=True` into `model.generate(**...)` (a family may count positions differently there). Rows may end up
    with different numbers of tokens: they are padded again, on the side that was padded. Position ids that you give
    yourself are kept, whatever the compressor's `positions`. Where tokens keep positions, a picture's tokens stand in
    the order of their anchors, so that positions ascend; contiguous ones are counted in the compressor's own order.
    What acts inside the LLM does not act here: for that there is `vlmzip.attach`.

    With `pack_rows`, which is for training without a cache, short rows stand side by side in one where they can (see
    `packing.py`): loss and gradients stay the same, logits are of the packed rows.

    A method with weights needs `resampler`, the module that holds them: the façade's attribute of this name.

    Raises `UserError` where placeholders and pictures do not match.
    """
    adapter = adapter or adapter_for(model)
    out = CompressedInputs(inputs)
    watch = Stopwatch(next(model.parameters()).device)
    if inputs.get("pixel_values_videos") is not None:
        warnings.warn("videos go through uncompressed: this version compresses pictures", stacklevel=2)
    if inputs.get(adapter.picture_inputs[0]) is None:
        _refuse_placeholders_without_pictures(adapter, inputs)
        out.report, out.spans = Report(compressor, [], None, watch), []
        return out

    ids, mask = _prompt(inputs)
    _refuse_unknown_tokens(adapter, ids)
    if len(inputs[adapter.picture_inputs[0]]) == 0:
        raise UserError(f"{adapter.picture_inputs[0]} is empty; leave it out where there are no pictures")
    given = inputs.get("position_ids") is not None
    original = given or positions_of(compressor, adapter) == "original"
    pictures, out.smaller = compress_pictures(adapter, inputs, compressor, watch, resampler, ascending=original)
    places = find_placeholders(ids, adapter.placeholder_id, [picture.report.before for picture in pictures])
    source = shorten(mask, places, [picture.offsets for picture in pictures], ascending=original)

    for name in adapter.picture_inputs:
        out.pop(name, None)
    check_takes(adapter.model, "mm_encoder_outputs")
    out["mm_encoder_outputs"] = adapter.encoder_outputs([picture.features for picture in pictures])
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
    reports = [replace(picture.report, row=row) for picture, (row, _) in zip(pictures, places, strict=True)]
    out.report = Report(compressor, reports, source, watch)
    goes_on = any(stage.site is Site.IN_LLM for stage in compressor.stages())
    out.spans = _spans(out["input_ids"], adapter.placeholder_id, reports) if goes_on else []
    if pack_rows and not goes_on and not generating and cache_of(out) is None:
        pack(out, adapter, pictures, {"input_ids": pad_id(adapter), **PER_TOKEN})
    return out


def _spans(ids: Int[Tensor, "batch length"], placeholder_id: int, pictures: Sequence[PictureReport]) -> list[Span]:
    """Where the pictures stand in the shortened prompt."""
    places = find_placeholders(ids, placeholder_id, [picture.after for picture in pictures])
    return [
        Span(row, columns, *left_on_grid(picture)) for (row, columns), picture in zip(places, pictures, strict=True)
    ]


def left_on_grid(picture: PictureReport) -> tuple[Grid | None, int]:
    """The grid on which a picture's tokens still lie, and the tokens before it."""
    if picture.grid is None or picture.token_map is None or picture.after != picture.before:
        return None, 0
    return picture.grid, picture.before - picture.grid.size


def positions_of(compressor: Compressor, adapter: ModelAdapter) -> str:
    """The policy for kept positions: the compressor's own, or what the papers use in this family."""
    return compressor.positions or compressor.stages()[0].default_positions or adapter.default_positions


def contiguous_positions(
    adapter: ModelAdapter, small: CompressedInputs, mask: Int[Tensor, "batch length"]
) -> tuple[Int[Tensor, "*axes batch length"], Int[Tensor, " batch"]]:
    """Positions of the compressed prompt, counted from 0 as `generate` does, and the position of each next token.

    One after another on every axis; smaller pictures keep a grid, which the family counts as it counts any other.
    """
    if small.smaller is not None:
        return adapter.original_positions({**small.smaller, "input_ids": small["input_ids"]}, mask)
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return positions.expand(*adapter.position_axes, *mask.shape), mask.sum(-1)


def compress_pictures(
    adapter: ModelAdapter,
    inputs: Mapping[str, Any],
    compressor: Compressor,
    watch: Stopwatch,
    resampler: nn.Module | None,
    *,
    ascending: bool = False,
) -> tuple[list[CompressedPicture], Mapping[str, Any] | None]:
    """Encodes, selects, applies and projects; the projector sees nothing but what is left.

    With it the inputs that the encoder saw, where its pictures were made smaller. `ascending`: tokens keep positions,
    so each compressor's output tokens stand in the order of their anchors, not in its own.
    """
    first, *later = [stage for stage in compressor.stages() if stage.site is not Site.IN_LLM] or [NoCompression()]
    smaller = None
    if isinstance(first, Resampler):
        pictures = resample_pictures(adapter, inputs, first, resampler, watch)
    elif first.site is Site.PIXELS:
        pictures, smaller = encode_smaller(adapter, inputs, first, watch)
    else:
        pictures = _encode_and_compress(adapter, inputs, first, watch)

    def ordered(some: list[CompressedPicture]) -> list[CompressedPicture]:
        with watch.time("bookkeeping"):
            return [picture.in_order_of_positions() for picture in some] if ascending else some

    pictures = ordered(pictures)
    for stage in later:
        with watch.time("selection"):
            pictures = [_compress_projected(stage, picture) for picture in pictures]
        pictures = ordered(pictures)
    return pictures, smaller


def _compress_projected(compressor: Compressor, picture: CompressedPicture) -> CompressedPicture:
    """What a second compressor, behind the projector, makes of one picture."""
    grid, prefix = left_on_grid(picture.report)
    token_map = compressor(VisualTokens(picture.features[None], grid, prefix, passes_prefix=True))
    count = token_map.lengths[0]
    if count == 0:
        raise UserError(f"{compressor.name()} left no token of a picture; it must keep at least one")
    before = picture.report.token_map
    report = replace(
        picture.report,
        after=count,
        by_layer=(count,) * len(picture.report.by_layer),
        token_map=before and before.then(token_map),
    )
    anchors = token_map.anchor_index()[0].tolist()
    return CompressedPicture(token_map.apply(picture.features[None])[0], [picture.offsets[a] for a in anchors], report)


def _encode_and_compress(
    adapter: ModelAdapter, inputs: Mapping[str, Any], compressor: Compressor, watch: Stopwatch
) -> list[CompressedPicture]:
    """The pictures behind the projector, through the first compressor before the LLM."""
    site = compressor.site
    with watch.time("encoder"):
        groups = adapter.encode(inputs, site, compressor.needs)
    found: dict[int, CompressedPicture] = {}
    for tokens, indices in groups:
        with watch.time("selection"):
            token_map = compressor(tokens)
            compressed = token_map.apply(tokens.features)
        lengths = token_map.lengths
        if 0 in lengths:
            raise UserError(f"{compressor.name()} left no token of a picture; it must keep at least one")
        with watch.time("projector"):
            flat = torch.cat([row[:length] for row, length in zip(compressed, lengths, strict=True)])
            projected = adapter.project(flat, site).split(lengths)
        with watch.time("bookkeeping"):
            anchors = token_map.anchor_index().tolist()
        hidden = tokens.features.shape[1] - tokens.plain_count
        for place, index in enumerate(indices):
            # A token outside the grid (CLS) has no placeholder of its own: it takes the position of the first.
            offsets = [max(anchor - hidden, 0) for anchor in anchors[place][: lengths[place]]]
            report = PictureReport(
                row=-1,
                before=tokens.plain_count,
                after=lengths[place],
                by_layer=(lengths[place],) * len(adapter.decoder_layers),
                token_map=token_map.rows(slice(place, place + 1)),
                grid=tokens.grid,
                prefix=tokens.prefix,
                features=tokens.features[place].detach(),
            )
            found[index] = CompressedPicture(projected[place], offsets, report)
    return [found[index] for index in sorted(found)]


def find_placeholders(
    ids: Int[Tensor, "batch length"], placeholder_id: int, counts: Sequence[int]
) -> list[tuple[int, list[int]]]:
    """For each picture its row and the columns of its placeholders, in order of appearance.

    `counts` are the pictures' visual tokens. Raises `UserError` where they do not fill the placeholders, row by row.
    """
    columns_of = [(row == placeholder_id).nonzero()[:, 0].tolist() for row in ids.cpu()]
    total = sum(map(len, columns_of))
    if total != sum(counts):
        raise UserError(
            f"the prompt has {total} image placeholders, but its {len(counts)} picture(s) have {sum(counts)} visual"
            " tokens; use the model's own processor, and one <image> for each picture"
        )
    places: list[tuple[int, list[int]]] = []
    row = used = 0
    for count in counts:
        while used == len(columns_of[row]):
            row, used = row + 1, 0
        columns = columns_of[row][used : used + count]
        if len(columns) < count:
            raise UserError(
                f"row {row} of the prompt ends in the middle of a picture: {len(columns)} of {count} placeholders"
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

    The tokens left of a picture stand where its first placeholder stood, and what stands among its placeholders behind
    them; an offset names the placeholder of each. `ascending`: all of them stand in the order of the prompt.
    """
    attended = mask.cpu().bool()
    kept_rows: list[list[int]] = []
    for row in range(len(mask)):
        columns = attended[row].nonzero()[:, 0]
        first, last = (int(columns[0]), int(columns[-1])) if len(columns) else (0, -1)
        kept: list[int] = []
        at = first
        for (place_row, placeholders), picture_offsets in zip(places, offsets, strict=True):
            if place_row == row:
                dropped = set(placeholders)
                kept += range(at, placeholders[0])
                left = [placeholders[offset] for offset in picture_offsets]
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
        raise UserError("give input_ids together with the pictures: vlmzip finds a picture's place by its placeholders")
    if inputs.get("inputs_embeds") is not None:
        raise UserError("give input_ids or inputs_embeds, not both, with pictures: embeddings have no placeholders")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise UserError(f"input_ids must be a tensor [batch, length]; got {getattr(ids, 'shape', type(ids).__name__)}")
    if mask is not None and mask.shape != ids.shape:
        wanted = f"{list(ids.shape)} as input_ids"
        raise UserError(f"attention_mask must be [batch, length] with pictures: {wanted}; got {list(mask.shape)}")
    return ids, torch.ones_like(ids) if mask is None else mask


def _refuse_placeholders_without_pictures(adapter: ModelAdapter, inputs: Mapping[str, Any]) -> None:
    ids = inputs.get("input_ids")
    if ids is None or inputs.get("mm_encoder_outputs"):
        return
    if bool((ids == adapter.placeholder_id).any()):
        raise UserError(f"the prompt has image placeholders, but there is no {adapter.picture_inputs[0]}")
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
