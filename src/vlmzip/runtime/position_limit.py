"""How many positions an LLM has, how many a prompt takes, and the one warning where these are more."""

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

#: The compressors that each model was warned about: one warning for each of them.
_warned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def llm_positions(family: Family) -> int | None:
    """Return how many positions the LLM was made for; `None` where its config does not say.

    Scaled rotary embeddings reach `factor` times the positions of pretraining. A config that states `factor` without
    those may mean its `max_position_embeddings` before or after scaling: we take the larger number.
    """
    positions = getattr(family.llm_config, "max_position_embeddings", None)
    if positions is None:
        return None
    rope = getattr(family.llm_config, "rope_parameters", None) or {}
    # Some LLMs have such settings for each kind of layer; the kind that reaches least far decides.
    kinds = [kind for kind in rope.values() if isinstance(kind, Mapping)] or [rope]
    return min(_reach(kind, positions) for kind in kinds)


def _reach(rope: Mapping[str, Any], positions: int) -> int:
    if rope.get("rope_type", "default") == "default":
        return positions
    pretrained = rope.get("original_max_position_embeddings") or positions
    return max(positions, int((rope.get("factor") or 1) * pretrained))


def positions_taken(family: Family, compressed: Inputs, *, generating: bool) -> list[int]:
    """Return how many positions each row of a prompt takes that is about to enter the model.

    With several axes the farthest counts: such positions go on more slowly than tokens do.
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
    """Warn once for each model and compressor where a prompt, or a prompt and its answer, takes too many positions.

    `original`: visual tokens keep their positions, so that fewer of them take no fewer positions.
    """
    limit, most = llm_positions(family), max(taken, default=0)
    if limit is None or most <= limit:
        return
    told = _warned.setdefault(family.model, set())
    if repr(compressor) in told:
        return
    told.add(repr(compressor))
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
