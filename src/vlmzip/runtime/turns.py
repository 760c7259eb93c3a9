"""Several turns on one KV cache: what is in a cache, and how the next turn's prompt joins it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models.adapter import ModelAdapter
from vlmzip.runtime.prepare import PER_TOKEN, CompressedInputs, compress_inputs, gather, pad_id, positions_of


@dataclass(frozen=True)
class Seen:
    """A conversation so far: as the user sees it, and as it lies in the cache."""

    ids: Int[Tensor, "batch length"]
    """The tokens so far, placeholders of uncompressed pictures included."""
    source: Int[Tensor, "batch short"]
    """For each compressed position the one in `ids` that it stands for; -1: padding."""
    mask: Int[Tensor, "batch short"]
    positions: Int[Tensor, "*axes batch short"]
    """Position of each compressed token under the policy, counted from 0."""
    prompt_length: int
    """Compressed positions up to the end of the last prompt; what follows was generated."""
    next_position: Int[Tensor, " batch"]
    """The position that follows the last prompt."""
    pictures: int
    """Pictures so far."""

    def and_generated(self, tokens: Int[Tensor, "batch new"]) -> Seen:
        """The conversation after the model has answered with `tokens`."""
        count = tokens.shape[1]
        steps = torch.arange(count, device=tokens.device)
        source = (self.ids.shape[1] + steps).expand(len(tokens), -1)
        positions = self.next_position[:, None] + steps
        return Seen(
            ids=torch.cat([self.ids, tokens], 1),
            source=torch.cat([self.source, source], 1),
            mask=torch.cat([self.mask, torch.ones_like(tokens)], 1),
            positions=torch.cat([self.positions, positions.expand(*self.positions.shape[:-1], -1)], -1),
            prompt_length=self.prompt_length,
            next_position=self.next_position,
            pictures=self.pictures,
        )


class Turns:
    """What is in each cache that a façade has filled; forgets a cache when nobody holds it any more."""

    def __init__(self) -> None:
        self._seen: WeakKeyDictionary[Any, Seen] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()  # a copy of a façade starts without conversations: the caches stay with the original

    def remember(self, cache: Any, seen: Seen) -> None:
        self._seen[cache] = seen

    def recall(self, cache: Any) -> Seen | None:
        """What is in `cache`; `None` if it is empty. Raises `UserError` for a cache that someone else filled."""
        if cache is None or (length := cache.get_seq_length()) == 0:
            return None
        seen = self._seen.get(cache)
        if seen is None:
            raise UserError(
                "this KV cache was not made by this model with this compressor, so what is in it is not known;"
                " start with an empty cache and the whole conversation"
            )
        short = seen.source.shape[1]
        if length not in (short, short - 1):  # the last generated token has not been through the model yet
            raise UserError(
                f"this KV cache has changed: it holds {length} tokens, not {short}; start with an empty one"
            )
        return seen


def first_turn(
    adapter: ModelAdapter,
    inputs: Mapping[str, Any],
    small: CompressedInputs,
    compressor: Compressor,
    *,
    generating: bool,
) -> Seen:
    """What a cache holds after the prompt `inputs`, compressed to `small`, has gone through the model."""
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    source = small.report.source
    if source is None:
        source = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    short_mask = gather(mask, source, 0)
    original, next_position = adapter.original_positions(inputs, mask)
    if positions_of(compressor, adapter) == "original":
        positions = gather(original, source, 0)
    elif generating:
        positions = (short_mask.long().cumsum(-1) - 1).clamp(min=0).expand_as(gather(original, source, 0))
        next_position = short_mask.sum(-1)
    else:  # a model's `forward` counts padding too
        positions = torch.arange(source.shape[1], device=ids.device).expand_as(gather(original, source, 0))
        next_position = torch.full_like(next_position, source.shape[1])
    return Seen(ids, source, short_mask, positions, source.shape[1], next_position, len(small.report.pictures))


def next_turn(
    model: nn.Module,
    adapter: ModelAdapter,
    inputs: Mapping[str, Any],
    compressor: Compressor,
    seen: Seen,
    *,
    generating: bool,
) -> tuple[CompressedInputs, Seen]:
    """Inputs for a later turn, given as the whole conversation or as its new part alone; and what is seen after it.

    Only pictures of the new part are encoded. For `generate` the prompt is the whole compressed conversation, of which
    it skips what the cache holds; for `forward` it is the new part.
    """
    new, seen_mask = _new_part(adapter, inputs, seen)
    part = compress_inputs(model, new, compressor, generating=True, adapter=adapter)
    after = first_turn(adapter, new, part, compressor, generating=True)
    offset = seen.next_position + seen_mask[:, seen.prompt_length :].sum(-1)
    mask = torch.cat([seen_mask, after.mask], 1)
    positions = torch.cat([seen.positions, after.positions + offset[:, None]], -1)
    whole = Seen(
        ids=torch.cat([seen.ids, new["input_ids"]], 1),
        source=torch.cat([seen.source, torch.where(after.source < 0, -1, after.source + seen.ids.shape[1])], 1),
        mask=mask,
        positions=positions,
        prompt_length=mask.shape[1],
        next_position=after.next_position + offset,
        pictures=seen.pictures + after.pictures,
    )
    out = CompressedInputs(inputs)
    out.report = part.report
    for name in (*adapter.picture_inputs, *PER_TOKEN):
        out.pop(name, None)
    if "mm_encoder_outputs" in part:
        out["mm_encoder_outputs"] = part["mm_encoder_outputs"]
    out["attention_mask"] = mask
    if generating:
        out["input_ids"] = gather(whole.ids, whole.source, pad_id(adapter))
        out["position_ids"] = positions
    else:
        out["input_ids"] = part["input_ids"]
        out["position_ids"] = adapter.forward_positions(positions[..., seen.mask.shape[1] :])
        if part.get("labels") is not None:
            out["labels"] = part["labels"]
    return out, whole


def _new_part(
    adapter: ModelAdapter, inputs: Mapping[str, Any], seen: Seen
) -> tuple[dict[str, Any], Int[Tensor, "batch short"]]:
    """The inputs of the part of the conversation that is not in the cache, and the mask of the part that is."""
    ids = inputs["input_ids"]
    old = seen.ids.shape[1]
    whole = ids.shape[1] > old and torch.equal(ids[:, :old], seen.ids)
    new_ids = ids[:, old:] if whole else ids
    if len(ids) != len(seen.ids):
        raise UserError(f"this KV cache holds {len(seen.ids)} rows, the prompt has {len(ids)}")
    new: dict[str, Any] = {"input_ids": new_ids, "attention_mask": torch.ones_like(new_ids)}
    seen_mask, mask = seen.mask, inputs.get("attention_mask")
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
        new["labels"] = inputs["labels"][:, -new_ids.shape[1] :]
    new |= _new_pictures(adapter, inputs, new_ids, seen.pictures)
    return new, seen_mask


def _new_pictures(
    adapter: ModelAdapter, inputs: Mapping[str, Any], new_ids: Int[Tensor, "batch new"], old: int
) -> dict[str, Any]:
    """The inputs of the pictures in the new part; `inputs` may hold all pictures of the conversation or these alone."""
    wanted = int((new_ids == adapter.placeholder_id).sum())
    if wanted == 0 or inputs.get(adapter.picture_inputs[0]) is None:
        return {}
    counts = adapter.plain_counts(inputs)
    if len(counts) > old and sum(counts[old:]) == wanted:
        return adapter.pictures_from(inputs, old)
    return {name: inputs[name] for name in adapter.picture_inputs if inputs.get(name) is not None}
