"""Prefill FLOPs and KV-cache bytes of an LLM, counted from its own layers; and as two papers count them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vlmzip.models.adapter import ModelAdapter


def prefill_flops(adapter: ModelAdapter, tokens: int | Sequence[int]) -> int:
    """Floating-point operations of the LLM for a prompt of `tokens` tokens (text and visual), one row.

    `tokens`: one number, or one for each layer where some of them see fewer.

    Two per weight and token of every linear layer; 4 * tokens^2 * heads * head size per layer for attention scores and
    their application (the full square, as `torch.utils.flop_counter` counts; a causal kernel does half); and the output
    head for the last token. Norms, activations and rotary embeddings are left out, as usual.

    `visionzip_flops` and `llavolta_flops` are what two papers count instead.
    """
    config = adapter.llm_config
    width = config.num_attention_heads * head_size(adapter)
    flops = 2 * config.hidden_size * config.vocab_size
    for layer, count in zip(adapter.decoder_layers, _by_layer(adapter, tokens), strict=True):
        weights = sum(m.in_features * m.out_features for m in layer.modules() if isinstance(m, nn.Linear))
        flops += 2 * weights * count + 4 * count**2 * width
    return flops


def visionzip_flops(tokens: Sequence[int], width: int, mlp: int) -> int:
    """VisionZip's T * (4nd^2 + 2n^2d + 2ndm), arXiv:2412.04467, summed over `tokens`, the n of each layer.

    `width` is d, `mlp` is m. One operation for each multiply-add, and an MLP of two matrices where Llama's has three.
    """
    return sum(4 * n * width**2 + 2 * n**2 * width + 2 * n * width * mlp for n in tokens)


def llavolta_flops(tokens: Sequence[int], width: int, mlp: int) -> int:
    """What LLaVolta (arXiv:2406.20092, Tables 2 and 5) seems to count; `tokens` are n of each layer, text among them.

    The paper gives figures and no formula. All seven lie within 0.01 TFLOPs of 2 * (4d^2 + 3dm) per token and layer
    with 62 tokens of text: two operations for each multiply-add, Llama's three MLP matrices, no products between tokens
    (scores and their application), no output head.
    """
    return sum(2 * n * (4 * width**2 + 3 * width * mlp) for n in tokens)


def flops_inside(modules: Sequence[nn.Module], run: Callable[[], object]) -> int:
    """What `torch.utils.flop_counter` counts while one of `modules` runs; none of them may hold another."""
    total = start = 0

    def enter(*_: object) -> None:
        nonlocal start
        start = counter.get_total_flops()

    def leave(*_: object) -> None:
        nonlocal total
        total += counter.get_total_flops() - start

    handles = [m.register_forward_pre_hook(enter) for m in modules] + [m.register_forward_hook(leave) for m in modules]
    # Views of trainable parameters, such as a Q-Former's queries, trouble the counter where no gradients are kept.
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


def _attention_on_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, queries, size = query
    return 2 * batch * heads * queries * key[-2] * (size + value[-1])


#: The CPU's fused attention, which torch's counter takes for no work at all (seen in 2.13).
_UNKNOWN_TO_TORCH = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu}


def kv_cache_bytes(adapter: ModelAdapter, tokens: int | Sequence[int]) -> int:
    """Bytes of keys and values that `tokens` tokens (at each layer) take in the LLM's cache, one row."""
    config = adapter.llm_config
    element = next(adapter.llm.parameters()).element_size()
    return 2 * config.num_key_value_heads * head_size(adapter) * element * sum(_by_layer(adapter, tokens))


def _by_layer(adapter: ModelAdapter, tokens: int | Sequence[int]) -> Sequence[int]:
    return [tokens] * len(adapter.decoder_layers) if isinstance(tokens, int) else tokens


def head_size(adapter: ModelAdapter) -> int:
    config = adapter.llm_config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
