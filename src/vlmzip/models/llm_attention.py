"""Queries and keys of a decoder layer, for the kinds of attention that differ in projections and norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlmzip.errors import UserError
from vlmzip.models.recording import rotate

#: A function that projects hidden states to queries or keys, with heads concatenated.
Projection = Callable[[Tensor], Tensor]


def queries_and_keys(
    layer: nn.Module,
    hidden: Float[Tensor, "batch length dim"],
    positions: tuple[Float[Tensor, "_ length rotary_dim"], Float[Tensor, "_ length rotary_dim"]],
    rows: Int[Tensor, "batch queries"],
) -> tuple[Float[Tensor, "batch heads queries head_dim"], Float[Tensor, "batch key_heads length head_dim"]]:
    """Return the rotated queries of the tokens in `rows` and the rotated keys of all tokens in a layer.

    `hidden` is the input of the layer; `positions` are cosine and sine. Raise `UserError` for an unknown kind of
    attention.
    """
    attention: Any = layer.self_attn
    to_query, to_key = projections(attention)
    normed = layer.input_layernorm(hidden)  # type: ignore[operator]
    cos, sin = (table.expand(len(hidden), -1, -1) for table in positions)
    query = _rotated(to_query(_rows(normed, rows)), attention, "q_norm", _rows(cos, rows), _rows(sin, rows))
    return query, _rotated(to_key(normed), attention, "k_norm", cos, sin)


def projections(attention: Any) -> tuple[Projection, Projection]:
    """Return the functions that project to queries and to keys. Raise `UserError` for an unknown kind of attention."""
    if hasattr(attention, "q_proj") and hasattr(attention, "k_proj"):
        return attention.q_proj, attention.k_proj
    if hasattr(attention, "qkv_proj") and hasattr(attention, "num_key_value_groups"):
        # The rows of the fused matrix are queries, keys, values. Queries take as many parts as query heads share a key.
        shares = attention.num_key_value_groups + 2
        size = attention.qkv_proj.weight.shape[0] // shares
        ends = (size * attention.num_key_value_groups, size * (attention.num_key_value_groups + 1))
        return _slice_of(attention.qkv_proj, 0, ends[0]), _slice_of(attention.qkv_proj, *ends)
    raise UserError(
        f"the attention of {type(attention).__name__} is of a kind whose queries and keys are not known:"
        " choose a method that does not look at the question's attention"
    )


def _slice_of(projection: Any, start: int, end: int) -> Projection:
    """Return a function for a part of a fused projection.

    It computes only that part. Quantised or adapted projections are computed completely and then sliced.
    """

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
    """Return the states by head, after the attention's norm if it has one, with the leading part rotated."""
    heads = states.unflatten(-1, (-1, attention.head_dim))
    if (head_norm := getattr(attention, norm, None)) is not None:
        heads = head_norm(heads)
    heads = heads.transpose(1, 2)
    width = cos.shape[-1]
    turned = heads[..., :width]
    turned = rotate(turned, cos[:, None].expand_as(turned), sin[:, None].expand_as(turned))
    return turned if width == heads.shape[-1] else torch.cat([turned, heads[..., width:]], dim=-1)


def _rows(
    values: Float[Tensor, "batch length _"], rows: Int[Tensor, "batch queries"]
) -> Float[Tensor, "batch queries _"]:
    return values.gather(1, rows[..., None].expand(-1, -1, values.shape[-1]))
