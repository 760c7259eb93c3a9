"""Queries and keys of a decoder layer, as its attention compares them."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, Cache

from vlmzip.errors import UnfitMethod
from vlmzip.models.recording import rotate
from vlmzip.processor import InputDict
from vlmzip.token_map import rows_at

#: Attentions of transformers that norm and rotate the outputs of `q_proj` and `k_proj` in the same way. The tests
#: compare them with the attention of the models. For these, we compute only the queries that are asked for.
DIRECT = (
    "LlamaAttention", "MistralAttention", "GemmaAttention", "Qwen2Attention", "Qwen3Attention", "Qwen2VLAttention",
    "Qwen2_5_VLAttention", "Qwen3VLTextAttention",
)  # fmt: skip
#: Cosines and sines of the angles by which attention rotates queries and keys: [batch, length, rotary_dim].
Tables: TypeAlias = tuple[Tensor, Tensor]
#: The name of the attention function that records its arguments.
RECORDING = "vlmzip_recording"


class QueriesAndKeys(NamedTuple):
    """Rotated queries of some tokens, rotated keys of all tokens, and the factor of their products."""

    query: Float[Tensor, "batch heads queries head_dim"]
    key: Float[Tensor, "batch key_heads length head_dim"]
    scale: float


class Recorded(Exception):
    """The arguments of a layer's attention function. The function raises it, so that the layer ends there."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, mask: object, scale: float | None, options: dict[str, object]
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.mask, self.options = query, key, value, mask, options
        self.scale = query.shape[-1] ** -0.5 if scale is None else scale


def _record(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    scaling: float | None = None,
    **options: object,
) -> NoReturn:
    raise Recorded(query, key, value, attention_mask, scaling, options)


AttentionInterface.register(RECORDING, _record)


def counted_from(tables: Tables, origin: Tables) -> Tables:
    """Return the tables of cosines and sines for positions that are smaller by the position of `origin`.

    `origin` has one position for each row of the batch. At position 0 the tables stay as they are.
    """
    (cos, sin), (cos_first, sin_first) = tables, origin
    factor = (cos_first.square() + sin_first.square()).sqrt()  # that of RoPE variants which scale their tables
    return (cos * cos_first + sin * sin_first) / factor, (sin * cos_first - cos * sin_first) / factor


def is_direct(layer: nn.Module) -> bool:
    """Return True if the attention of a layer is one of `DIRECT`."""
    kind = type(getattr(layer, "self_attn", None))
    return kind.__name__ in DIRECT and kind.__module__.startswith("transformers.")


def queries_and_keys(
    layer: nn.Module,
    hidden: Float[Tensor, "batch length dim"],
    arguments: InputDict,
    rows: Int[Tensor, "batch queries"],
) -> QueriesAndKeys:
    """Return the rotated queries of the tokens in `rows` and the rotated keys of all tokens, for one of `DIRECT`.

    `hidden` is the input of the layer, and `arguments` has its keyword arguments.
    """
    attention: Any = layer.self_attn
    normed = layer.input_layernorm(hidden)  # type: ignore[operator]
    cos, sin = (table.expand(len(hidden), -1, -1) for table in arguments["position_embeddings"])
    query = _rotated(
        attention.q_proj(rows_at(normed, rows)), attention, "q_norm", rows_at(cos, rows), rows_at(sin, rows)
    )
    key = _rotated(attention.k_proj(normed), attention, "k_norm", cos, sin)
    return QueriesAndKeys(query, key, attention.scaling)


def recorded(layer: nn.Module, hidden: Float[Tensor, "batch length dim"], arguments: InputDict) -> Recorded:
    """Return what a layer passes to its attention function for these tokens, without the tokens in the KV cache.

    A shallow copy of the layer runs up to the attention function. The layer, its cache and its config stay as they are.
    Raise `UserError` for a layer whose attention does not call a function of transformers' `AttentionInterface`.
    """
    attention = getattr(layer, "self_attn", None)
    config = getattr(attention, "config", None)
    if attention is not None and config is not None:
        config = copy.copy(config)
        config._attn_implementation_internal = RECORDING  # the public setter would change parts that copies share
        twin = _twin(layer, self_attn=_twin(attention, config=config))
        call: Callable[..., object] = type(layer).forward
        known = {name: None if isinstance(value, Cache) else value for name, value in arguments.items()}
        try:
            call(twin, _on_device_of(layer, hidden), **_on_device_of(layer, known))
        except Recorded as record:
            return record
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            pass  # a layer that needs its cache, or further positional arguments
    raise UnfitMethod(
        f"the attention of {type(layer).__name__} is of a kind whose queries and keys are not known: choose a method"
        " that does not look at the question's attention, or a site before the LLM"
    )


def queries_in(record: Recorded, rows: Int[Tensor, "batch queries"]) -> QueriesAndKeys:
    """Return the recorded queries of the tokens in `rows`, and all recorded keys."""
    index = rows[:, None, :, None].expand(-1, record.query.shape[1], -1, record.query.shape[-1])
    return QueriesAndKeys(record.query.gather(2, index), record.key, record.scale)


def _twin(module: nn.Module, **changes: object) -> nn.Module:
    """Return a shallow copy of a module with other attributes or children, and without the hooks of the module.

    Its children keep their hooks. accelerate, for example, loads offloaded weights in them.
    """
    twin = copy.copy(module)
    state = twin.__dict__
    state |= {name: OrderedDict() for name in state if name.endswith("_hooks")}
    state.pop("forward", None)  # accelerate's, which calls the original module
    state["_modules"] = dict(module._modules)
    for name, value in changes.items():
        (state["_modules"] if isinstance(value, nn.Module) else state)[name] = value
    return twin


def _on_device_of(layer: nn.Module, value: Any) -> Any:
    """Return tensors on the device to which accelerate moves the inputs of `layer`; other values as they are."""
    device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    if device is None:
        return value
    if isinstance(value, dict):
        return {name: _on_device_of(layer, part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_on_device_of(layer, part) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _rotated(
    states: Float[Tensor, "batch length dim"],
    attention: Any,
    norm: str,
    cos: Float[Tensor, "batch length rotary_dim"],
    sin: Float[Tensor, "batch length rotary_dim"],
) -> Float[Tensor, "batch heads length head_dim"]:
    """Return the states by head, after the attention's norm if it has one, rotated."""
    heads = states.unflatten(-1, (-1, attention.head_dim))
    if (head_norm := getattr(attention, norm, None)) is not None:
        heads = head_norm(heads)
    heads = heads.transpose(1, 2)
    return rotate(heads, cos[:, None].expand_as(heads), sin[:, None].expand_as(heads))
