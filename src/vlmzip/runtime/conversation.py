"""Conversations of several turns on one KV cache: the state of a cache, and the prompt of the next turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models.family import Family
from vlmzip.processor import InputDict, Inputs
from vlmzip.runtime.cache_names import cache_of
from vlmzip.runtime.compressed_inputs import CompressedInputs
from vlmzip.runtime.inputs import compress_inputs, contiguous_positions, positions_of
from vlmzip.runtime.prompt import PER_TOKEN, find_placeholders, gather, pad_id
from vlmzip.runtime.report import Report, Stopwatch


@dataclass(frozen=True)
class CacheState:
    """The state of a cache: the conversation so far, uncompressed and compressed."""

    ids: Int[Tensor, "batch length"]
    """The tokens so far, with all placeholders of the uncompressed images."""
    real: Bool[Tensor, "batch length"]
    """True for tokens of `ids` that are not padding."""
    source: Int[Tensor, "batch short"]
    """The column of `ids` that each column of the compressed conversation comes from; -1 for padding."""
    mask: Int[Tensor, "batch short"]
    positions: Int[Tensor, "*axes batch short"]
    """The position of each compressed token under the position policy, counted from 0."""
    prompt_length: int
    """The number of compressed columns up to the end of the last prompt; later columns were generated."""
    next_position: Int[Tensor, " batch"]
    """The position that follows the last prompt."""
    images: dict[str, list[int]]
    """The number of images and of videos so far in each row, by modality."""
    keys: dict[int, Tensor] = field(default_factory=dict)
    """The conversation column of each token in the cache of a compressing layer, by layer (`LayerCut.keys`)."""
    sizes: dict[int, Tensor] = field(default_factory=dict)
    """The number of tokens that each of these stands for, if tokens are restored after layers."""

    def and_generated(self, tokens: Int[Tensor, "batch new"], filler: Bool[Tensor, "batch new"]) -> CacheState:
        """Return the state after the model has answered with `tokens`; `filler` marks padding after short answers."""
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        mask = (~filler).to(self.mask.dtype)
        positions = (self.next_position[:, None] + steps).expand(*self.positions.shape[:-1], -1)
        return replace(
            self,
            ids=torch.cat([self.ids, tokens], 1),
            real=torch.cat([self.real, ~filler], 1),
            source=torch.cat([self.source, (self.ids.shape[1] + steps).expand(len(tokens), -1)], 1),
            mask=torch.cat([self.mask, mask], 1),
            positions=torch.cat([self.positions, positions], -1),
        )


class Conversations:
    """The states of the caches that a façade has filled. References to the caches are weak."""

    def __init__(self) -> None:
        self._seen: WeakKeyDictionary[object, CacheState] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Conversations], tuple[()]]:
        return Conversations, ()  # a copied façade starts without conversations: the caches belong to the original

    def remember(self, cache: object, seen: CacheState) -> None:
        self._seen[cache] = seen

    def recall(self, cache: Any) -> CacheState | None:
        """Return the state of `cache`, or `None` if it is empty.

        Raise `UserError` if the state is unknown, or if the cache has changed since.
        """
        if cache is None or (length := cache.get_seq_length()) == 0:
            return None
        seen = self._seen.get(cache)
        if seen is None:
            raise UserError(
                "the content of this KV cache is unknown: another model or compressor filled it, or a call with"
                " inputs_embeds or position_ids, or it is a copy (deepcopy, pickle); start with an empty cache and the"
                " whole conversation"
            )
        short = seen.source.shape[1]
        if length not in (short, short - 1):  # the model has not processed the last generated token yet
            raise UserError(
                f"this KV cache has changed: it holds {length} tokens, not {short}; start with an empty one"
            )
        return seen


def first_turn(
    family: Family,
    inputs: Inputs,
    compressed: CompressedInputs,
    compressor: Compressor,
    *,
    generating: bool,
) -> CacheState:
    """Return the state of a cache after the model has processed the prompt `inputs`, compressed to `compressed`."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    source = compressed.report.source
    if source is None:
        source = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    short_mask = gather(mask, source, 0)
    if positions_of(compressor, family) == "original":
        original, next_position = compressed.counted or family.original_positions(inputs, mask)
        positions = gather(original, source, 0)
    elif generating or (compressed.smaller is not None and family.position_axes):
        positions, next_position = compressed.counted or contiguous_positions(family, compressed, short_mask)
    else:  # a model's `forward` counts padding too
        length = source.shape[1]
        positions = torch.arange(length, device=ids.device).expand(*family.position_axes, len(ids), length)
        next_position = torch.full((len(ids),), length, device=ids.device)
    return CacheState(
        ids, mask.bool(), source, short_mask, positions, source.shape[1], next_position,
        {
            each.modality: [
                sum(image.row == row and image.modality == each.modality for image in compressed.report.images)
                for row in range(len(ids))
            ]
            for each in family.modalities
        },
    )  # fmt: skip


def next_turn(
    model: nn.Module,
    family: Family,
    inputs: Inputs,
    compressor: Compressor,
    seen: CacheState,
    *,
    generating: bool,
    resampler: nn.Module | None = None,
) -> tuple[CompressedInputs, CacheState]:
    """Return the inputs for a later turn, and the state of the cache after its prompt.

    The prompt in `inputs` is the whole conversation or only its new part. `seen` is the state of the cache before.

    Only images of the new part are encoded. For `generate` the returned prompt is the whole compressed conversation;
    `generate` skips the part that the cache holds. For `forward` it is the part that the cache does not hold.
    """
    # After `generate`, the model has not processed the last token of the answer.
    pending = seen.source.shape[1] - cache_of(inputs).get_seq_length()
    new, seen_mask = _new_part(family, inputs, seen, 0 if generating else pending)
    out = CompressedInputs(inputs)
    for name in (*(name for each in family.modalities for name in each.image_inputs), *PER_TOKEN):
        out.pop(name, None)
    whole = replace(seen, mask=seen_mask)
    if new["input_ids"].shape[1]:
        part = compress_inputs(model, new, compressor, generating=True, family=family, resampler=resampler)
        whole = _joined(whole, first_turn(family, new, part, compressor, generating=True))
        out |= {name: part[name] for name in ("mm_encoder_outputs", "labels") if part.get(name) is not None}
        report = part.report
        start_of_part = seen.source.shape[1]
        spans = [replace(s, columns=[start_of_part + c for c in s.columns]) for s in part.spans]
    else:
        report, spans = Report(compressor, [], None, Stopwatch(seen.ids.device)), []
    start = 0 if generating else seen.source.shape[1] - pending
    positions = whole.positions if generating else family.forward_positions(whole.positions[..., start:])
    out["input_ids"] = gather(whole.ids, whole.source, pad_id(family))[:, start:]
    out["attention_mask"], out["position_ids"] = whole.mask, positions
    if "labels" in out and pending and not generating:
        out["labels"] = torch.nn.functional.pad(out["labels"], (pending, 0), value=PER_TOKEN["labels"])
    out.report, out.spans = replace(report, source=whole.source[:, start:]), spans
    return out, whole


def _joined(seen: CacheState, new: CacheState) -> CacheState:
    """Join a conversation and its continuation; the positions of `new` count from 0."""
    length, generated = seen.ids.shape[1], seen.mask[:, seen.prompt_length :].sum(-1)
    offset = seen.next_position + generated
    mask = torch.cat([seen.mask, new.mask], 1)
    return CacheState(
        ids=torch.cat([seen.ids, new.ids], 1),
        real=torch.cat([seen.real, new.real], 1),
        source=torch.cat([seen.source, torch.where(new.source < 0, -1, new.source + length)], 1),
        mask=mask,
        positions=torch.cat([seen.positions, new.positions + offset[:, None]], -1),
        prompt_length=mask.shape[1],
        next_position=new.next_position + offset,
        images={
            modality: [before + added for before, added in zip(counts, new.images[modality], strict=True)]
            for modality, counts in seen.images.items()
        },
    )


def _new_part(
    family: Family, inputs: Inputs, seen: CacheState, pending: int
) -> tuple[InputDict, Int[Tensor, "batch short"]]:
    """Return the inputs of the new part of the conversation, and the compressed attention mask of the seen part."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    old = seen.ids.shape[1]
    if len(ids) != len(seen.ids):
        raise UserError(f"this KV cache holds {len(seen.ids)} rows, the prompt has {len(ids)}")
    if ids.shape[1] >= old and torch.equal(ids[:, :old], seen.ids):
        whole, new_ids = True, ids[:, old:]
    elif (rows := _rows_after(ids, mask, seen)) is not None:  # the same conversation with different padding
        whole, (new_ids, mask) = True, rows
    elif ids.shape[1] >= old and (mask is None or mask.shape[1] == ids.shape[1]) and _begins_alike(ids, mask, seen):
        raise UserError(
            "this looks like the whole conversation, but does not begin with what is in the KV cache (the answer may"
            " have been tokenised anew): append new tokens to the ids that generate returned, or start with an empty"
            f" cache; if it is the new part alone, give an attention_mask of {old + ids.shape[1]} columns with it"
        )
    else:
        whole, new_ids = False, ids
        if pending and torch.equal(ids[:, :pending], seen.ids[:, old - pending :]):
            new_ids = ids[:, pending:]  # the prompt repeats the last generated token, as transformers requires
    new: InputDict = {"input_ids": new_ids, "attention_mask": torch.ones_like(new_ids)}
    seen_mask = seen.mask
    if mask is not None and mask.shape[1] == old + new_ids.shape[1]:
        seen_mask = gather(mask[:, :old], seen.source, 0)
        new["attention_mask"] = mask[:, old:]
    elif mask is not None and mask.shape[1] == new_ids.shape[1]:
        new["attention_mask"] = mask
    elif mask is not None:
        raise UserError(
            f"attention_mask has {mask.shape[1]} columns; give {old + new_ids.shape[1]} for the whole conversation"
            f" or {new_ids.shape[1]} for its new part"
        )
    if inputs.get("labels") is not None:
        new["labels"] = inputs["labels"][:, inputs["labels"].shape[1] - new_ids.shape[1] :]
    for each in family.modalities:
        new |= _new_images(each, inputs, new_ids, seen, whole=whole)
    return new, seen_mask


def _rows_after(
    ids: Int[Tensor, "batch length"], mask: Tensor | None, seen: CacheState
) -> tuple[Int[Tensor, "batch new"], Int[Tensor, "batch new"]] | None:
    """Return the tokens after the seen conversation in each row, padded on the left, and their mask.

    Return `None` if a row does not begin with the seen conversation, or if `mask` does not have the shape of `ids`.
    """
    if mask is None or mask.shape != ids.shape:
        return None
    rows = []
    for row, row_mask, old, real in zip(ids, mask.bool(), seen.ids, seen.real, strict=True):
        tokens, known = row[row_mask], old[real]
        if len(tokens) < len(known) or not torch.equal(tokens[: len(known)], known):
            return None
        rows.append(tokens[len(known) :].flip(0))
    new = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).flip(1)
    ones = [torch.ones_like(row) for row in rows]
    return new, torch.nn.utils.rnn.pad_sequence(ones, batch_first=True).flip(1)


def _begins_alike(ids: Int[Tensor, "batch length"], mask: Tensor | None, seen: CacheState) -> bool:
    """Return whether a row begins with at least half of its conversation so far, which is rare for a new part."""
    for row, row_mask, old, real in zip(
        ids, ids >= 0 if mask is None else mask.bool(), seen.ids, seen.real, strict=True
    ):
        tokens, known = row[row_mask], old[real]
        shared = min(len(tokens), len(known))
        same = (tokens[:shared] == known[:shared]).long().cumprod(0).sum()
        if len(known) and 2 * int(same) >= len(known):
            return True
    return False


def _new_images(
    family: Family,
    inputs: Inputs,
    new_ids: Int[Tensor, "batch new"],
    seen: CacheState,
    *,
    whole: bool,
) -> InputDict:
    """Return the inputs of the images in the new part; `inputs` has all images of the conversation or only these.

    `family` serves images or videos; a video is an image here.
    """
    placeholders, kind = int((new_ids == family.placeholder_id).sum()), family.modality
    if inputs.get(family.image_inputs[0]) is None:
        return {}
    counts = family.plain_counts(inputs)
    conversation = torch.cat([seen.ids, new_ids], 1)
    if sum(counts) == int((conversation == family.placeholder_id).sum()) and (whole or placeholders):
        seen_images = seen.images[family.modality]
        return _later_images(family, inputs, conversation, counts, seen_images) if placeholders else {}
    if sum(counts) != placeholders:
        raise UserError(
            f"the new part of the prompt has {placeholders} {kind} placeholders, but its {kind}s have {sum(counts)}"
            f" visual tokens; use the model's own processor, and one <{kind}> for each {kind}"
        )
    return {name: inputs[name] for name in family.image_inputs if inputs.get(name) is not None}


def _later_images(
    family: Family,
    inputs: Inputs,
    conversation: Int[Tensor, "batch length"],
    counts: Sequence[int],
    seen: Sequence[int],
) -> InputDict:
    """Return the inputs of a conversation's images, in order of rows, without the first `seen[row]` of each row."""
    chosen, at = [], [0] * len(conversation)
    for index, (row, _) in enumerate(find_placeholders(conversation, family.placeholder_id, counts)):
        if at[row] >= seen[row]:
            chosen.append(index)
        at[row] += 1
    return family.choose_images(inputs, chosen)
