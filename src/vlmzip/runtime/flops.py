"""Prefill FLOPs and KV-cache bytes of an LLM, counted from its layers, and FLOPs as two papers count them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar, overload

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlmzip.models.family import Family

Count = TypeVar("Count", int, float)


@overload
def prefill_flops(family: Family, tokens: int | Sequence[int]) -> int: ...
@overload
def prefill_flops(family: Family, tokens: Sequence[float]) -> float: ...
def prefill_flops(family: Family, tokens: int | Sequence[int] | Sequence[float]) -> int | float:
    """Return the LLM's floating-point operations for one prompt of `tokens` tokens, text and visual.

    `tokens` is one number, or one per layer if some layers see fewer tokens. The number of a layer may be a mean over
    several images, such as 35.5. Counted are

    - 2 per weight and token of every linear layer,
    - 4 * tokens^2 * heads * head size per layer for attention scores and their application. This is the full square,
      as `torch.utils.flop_counter` counts; a causal kernel computes half of it.
    - the output head for the last token.

    Norms, activations and rotary embeddings are left out, as usual. `visionzip_flops` and `llavolta_flops` count as
    two papers do.
    """
    config = family.llm_config
    width = config.num_attention_heads * head_size(family)
    flops: int | float = 2 * config.hidden_size * config.vocab_size
    for layer, count in zip(family.decoder_layers, _by_layer(family, tokens), strict=True):
        weights = sum(m.in_features * m.out_features for m in layer.modules() if isinstance(m, nn.Linear))
        flops += 2 * weights * count + 4 * count**2 * width
    return flops


def visionzip_flops(tokens: Sequence[int], width: int, mlp: int) -> int:
    """Return VisionZip's T * (4nd^2 + 2n^2d + 2ndm) (arXiv:2412.04467), summed over `tokens`, the n of each layer.

    `width` is d, `mlp` is m. The paper counts one operation per multiply-add, and two matrices in the MLP, although
    Llama's MLP has three.
    """
    return sum(4 * n * width**2 + 2 * n**2 * width + 2 * n * width * mlp for n in tokens)


def llavolta_flops(tokens: Sequence[int], width: int, mlp: int) -> int:
    """Return FLOPs as LLaVolta (arXiv:2406.20092, Tables 2 and 5) seems to count them.

    `tokens` is the number of tokens at each layer, including text; `width` is d, `mlp` is m. The paper gives figures
    but no formula. All seven figures lie within 0.01 TFLOPs of 2 * (4d^2 + 3dm) per token and layer with 62 text
    tokens: two operations per multiply-add, the three matrices of Llama's MLP, no products between tokens (scores and
    their application), and no output head.
    """
    return sum(2 * n * (4 * width**2 + 3 * width * mlp) for n in tokens)


def flops_inside(modules: Sequence[nn.Module], run: Callable[[], object]) -> int:
    """Return the FLOPs that `torch.utils.flop_counter` counts while one of `modules` runs.

    No module may contain another one of them.
    """
    total = start = 0

    def enter(*_: object) -> None:
        nonlocal start
        start = counter.get_total_flops()

    def leave(*_: object) -> None:
        nonlocal total
        total += counter.get_total_flops() - start

    handles = [m.register_forward_pre_hook(enter) for m in modules] + [m.register_forward_hook(leave) for m in modules]
    # Without gradients, the counter fails on views of trainable parameters, such as a Q-Former's queries.
    trainable = [parameter for m in modules for parameter in m.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        with FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH) as counter:
            run()
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    return total


def _attention_on_cpu(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
    batch, heads, queries, size = query
    return 2 * batch * heads * queries * key[-2] * (size + value[-1])


#: The CPU's fused attention, which torch's counter counts as 0 (seen in 2.13).
_UNKNOWN_TO_TORCH = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu}


def kv_cache_bytes(family: Family, tokens: int | Sequence[int]) -> int:
    """Return the bytes of keys and values in the LLM's cache for one row of `tokens` tokens, or tokens per layer."""
    config = family.llm_config
    element = next(family.llm.parameters()).element_size()
    return 2 * config.num_key_value_heads * head_size(family) * element * sum(_by_layer(family, tokens))


def _by_layer(family: Family, tokens: int | Sequence[Count]) -> Sequence[int] | Sequence[Count]:
    """Return the tokens at each layer; one number stands for all layers."""
    return [tokens] * len(family.decoder_layers) if isinstance(tokens, int) else tokens


def head_size(family: Family) -> int:
    """Return the width of one attention head of the LLM."""
    config = family.llm_config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
