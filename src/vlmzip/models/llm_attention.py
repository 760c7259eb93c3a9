"""Queries and keys of a decoder layer, by the kind of its attention: which projections make them, and their norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmzip.errors import UserError
from vlmzip.models.recording import rotate

#: Projects hidden states to queries or keys, heads side by side.
Projection = Callable[[Tensor], Tensor]


def queries_and_keys(
    layer: nn.Module,
    hidden: Float[Tensor, "batch length dim"],
    positions: tuple[Float[Tensor, "_ length rotary_dim"], Float[Tensor, "_ length rotary_dim"]],
    rows: Int[Tensor, "batch queries"],
) -> tuple[Float[Tensor, "batch heads queries head_dim"], Float[Tensor, "batch key_heads length head_dim"]]:
    """Return rotated queries of the tokens in `rows` and rotated keys of all, as the layer's attention has them.

    `hidden` is what the layer is given; `positions` are cosine and sine. Raise `UserError` for a kind of attention that
    is not known.
    """
    attention: Any = layer.self_attn
    to_query, to_key = projections(attention)
    normed = layer.input_layernorm(hidden)  # type: ignore[operator]
    cos, sin = (table.expand(len(hidden), -1, -1) for table in positions)
    query = _rotated(to_query(_rows(normed, rows)), attention, "q_norm", _rows(cos, rows), _rows(sin, rows))
    return query, _rotated(to_key(normed), attention, "k_norm", cos, sin)


def projections(attention: Any) -> tuple[Projection, Projection]:
    """Return what projects to queries and to keys."""
    if hasattr(attention, "q_proj") and hasattr(attention, "k_proj"):
        return attention.q_proj, attention.k_proj
    if hasattr(attention, "qkv_proj") and hasattr(attention, "num_key_value_groups"):
        # One matrix makes the queries, as many parts as share a key, then the keys and the values, one part each.
        shares = attention.num_key_value_groups + 2
        size = attention.qkv_proj.weight.shape[0] // shares
        ends = (size * attention.num_key_value_groups, size * (attention.num_key_value_groups + 1))
        return _slice_of(attention.qkv_proj, 0, ends[0]), _slice_of(attention.qkv_proj, *ends)
    raise UserError(
        f"the attention of {type(attention).__name__} is of a kind whose queries and keys are not known:"
        " choose a method that does not look at the question's attention"
    )


def _slice_of(projection: Any, start: int, end: int) -> Projection:
    """A part of a fused projection, computed alone. Quantised or adapted ones are computed whole and cut."""

    def project(states: Tensor) -> Tensor:
        if type(projection) is not nn.Linear:
            whole: Tensor = projection(states)
            return whole[..., start:end]
        bias = None if projection.bias is None else projection.bias[start:end]
        return nn.functional.linear(states, projection.weight[start:end], bias)

    return project


def _rotated(
    states: Float[Tensor, "batch length dim"],
    attention: Any,
    norm: str,
    cos: Float[Tensor, "batch length rotary_dim"],
    sin: Float[Tensor, "batch length rotary_dim"],
) -> Float[Tensor, "batch heads length head_dim"]:
    """The states by head, behind the attention's own norm if it has one, with rotary positions on the leading part."""
    heads = states.unflatten(-1, (-1, attention.head_dim))
    if (own := getattr(attention, norm, None)) is not None:
        heads = own(heads)
    heads = heads.transpose(1, 2)
    width = cos.shape[-1]
    turned = heads[..., :width]
    turned = rotate(turned, cos[:, None].expand_as(turned), sin[:, None].expand_as(turned))
    return turned if width == heads.shape[-1] else torch.cat([turned, heads[..., width:]], dim=-1)


def _rows(
    values: Float[Tensor, "batch length _"], rows: Int[Tensor, "batch queries"]
) -> Float[Tensor, "batch queries _"]:
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))
