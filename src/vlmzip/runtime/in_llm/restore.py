"""Tokens that do not enter a layer, and that get the layer's change of the token that stands in for them.

The difference between a token and its stand-in is set aside before the layer, and added to the stand-in after it. A
token without a stand-in skips the layer. The difference is attached to the input of the layer, so that a layer that
runs again during backward finds the right one, even in another thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vlmzip.runtime.in_llm.cut import Merge
from vlmzip.runtime.in_llm.indices import look_up

#: The attribute of a layer's input that holds what was set aside.
ASIDE = "vlmzip_aside"


class Aside(NamedTuple):
    """The part of the tokens that a layer does not see."""

    stand_in: Int[Tensor, "batch length"]
    """The slot of the token that stands in for each token in the layer; -1 for none."""
    difference: Float[Tensor, "batch length dim"]
    """Each token minus its stand-in; the token itself if it has none."""

    def restored(self, output: Float[Tensor, "batch kept dim"]) -> Float[Tensor, "batch length dim"]:
        """Return the output of the layer for all tokens."""
        return _spread(output, self.stand_in) + self.difference


def stand_ins(
    merges: Sequence[Merge], source: Int[Tensor, "batch kept"], length: int
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch kept"]]:
    """Return the slot of the token that stands in for each of `length` tokens, and how many each slot stands for.

    `merges` and `source` are those of `LayerCut`. Padding stands for one token.
    """
    batch, device = len(source), source.device
    # The slot before the cut of each token's anchor: its own slot, or the anchor of its output token; -1 if dropped.
    anchor = torch.arange(length, device=device).repeat(batch, 1)
    for rows, slots, token_map in merges:
        anchors = slots.gather(1, token_map.anchor_index().clamp(min=0))
        anchor[rows[:, None], slots] = look_up(anchors, token_map.group)
    # Invert `source`. The extra last column receives the values of padding.
    after = torch.full((batch, length + 1), -1, device=device)
    slot = torch.arange(source.shape[1], device=device).expand_as(source)
    after = after.scatter(1, torch.where(source < 0, length, source), slot)
    stand_in = look_up(after, anchor)
    sizes = torch.zeros_like(source).scatter_add(1, stand_in.clamp(min=0), (stand_in >= 0).long())
    return stand_in, sizes.clamp(min=1)


def set_aside(
    hidden: Float[Tensor, "batch kept dim"],
    whole: Float[Tensor, "batch length dim"],
    stand_in: Int[Tensor, "batch length"],
) -> None:
    """Set aside what the input `hidden` of a layer lacks of the `whole` states."""
    setattr(hidden, ASIDE, Aside(stand_in, whole - _spread(hidden, stand_in)))


def aside_of(hidden: object) -> Aside | None:
    """Return what was set aside from the input of a layer; `None` if it has all tokens."""
    return getattr(hidden, ASIDE, None)


def _spread(
    states: Float[Tensor, "batch kept dim"], stand_in: Int[Tensor, "batch length"]
) -> Float[Tensor, "batch length dim"]:
    """Return the state of each token's stand-in; 0 for tokens without one."""
    index = stand_in.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1])
    return states.gather(1, index).masked_fill((stand_in < 0)[..., None], 0.0)
