"""The number of positions that an LLM supports, the number that a prompt takes, and the warning if it takes more."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vlmzip.compressor import Compressor
from vlmzip.errors import BeyondPositions
from vlmzip.models.family import Family
from vlmzip.processor import Inputs
from vlmzip.visual_tokens import Site

#: The compressors that each model has been warned about: each gets one warning.
_warned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def llm_positions(family: Family) -> int | None:
    """Return the number of positions that the LLM supports; `None` if its config does not state it.

    Scaled rotary embeddings support `factor` times the positions of pretraining. If a config gives `factor` without
    `original_max_position_embeddings`, its `max_position_embeddings` may be the number before or after scaling. We
    then assume that it is the number before scaling, which gives the larger limit.
    """
    positions = getattr(family.llm_config, "max_position_embeddings", None)
    if positions is None:
        return None
    rope = getattr(family.llm_config, "rope_parameters", None) or {}
    # Some LLMs have these settings for each kind of layer. The smallest limit counts.
    kinds = [kind for kind in rope.values() if isinstance(kind, Mapping)] or [rope]
    return min(_reach(kind, positions) for kind in kinds)


def _reach(rope: Mapping[str, Any], positions: int) -> int:
    if rope.get("rope_type", "default") == "default":
        return positions
    pretrained = rope.get("original_max_position_embeddings") or positions
    return max(positions, int((rope.get("factor") or 1) * pretrained))


def positions_taken(family: Family, compressed: Inputs, *, generating: bool) -> list[int]:
    """Return the number of positions that each row takes, for a prompt that is about to enter the model.

    If positions have several axes, the largest value counts. Such positions grow more slowly than the number of tokens.
    """
    positions, mask = compressed.get("position_ids"), compressed.get("attention_mask")
    if isinstance(positions, Tensor) and positions.ndim > 1 and positions.numel():
        first = 0 if generating else int(family.forward_positions(torch.zeros(1, 1, dtype=torch.long)))
        rows = positions.reshape(-1, *positions.shape[-2:]).amax((0, 2))
        return (rows + 1 - first).tolist()
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.sum(-1).tolist()
    tokens = compressed.get("input_ids") if compressed.get("input_ids") is not None else compressed.get("inputs_embeds")
    return [] if tokens is None else [tokens.shape[1]] * len(tokens)


def warn_beyond(
    family: Family, compressor: Compressor, taken: Sequence[int], *, original: bool, answered: bool = False
) -> None:
    """Warn if a prompt, or a prompt with its answer (`answered`), takes too many positions.

    Each model and compressor gets the warning once. `original`: visual tokens keep their original positions, so keeping
    fewer of them does not save positions.
    """
    limit, most = llm_positions(family), max(taken, default=0)
    if limit is None or most <= limit:
        return
    warned = _warned.setdefault(family.model, set())
    if repr(compressor) in warned:
        return
    warned.add(repr(compressor))
    plain = compressor.changes_nothing
    before = any(stage.site is not Site.IN_LLM for stage in compressor.stages())
    advice = ["ask for a shorter answer"] if answered else []
    advice += ["keep fewer visual tokens"] if before and not plain and not original else []
    how = "without compression" if plain else f"with {compressor.name()}"
    warnings.warn(
        f"{how} the prompt{' and its answer take' if answered else ' takes'} {most:,} positions and the LLM has"
        f" {limit:,}: the answer may be wrong; {', '.join([*advice, 'give fewer images or less text'])}",
        BeyondPositions,
        stacklevel=3,
    )
