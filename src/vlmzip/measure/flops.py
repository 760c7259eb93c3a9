"""Prefill FLOPs and KV-cache bytes of an LLM, counted from its own layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vlmzip.models.adapter import ModelAdapter


def prefill_flops(adapter: ModelAdapter, tokens: int | Sequence[int]) -> int:
    """Floating-point operations of the LLM for a prompt of `tokens` tokens (text and visual), one row.

    `tokens`: one number, or one for each layer where some of them see fewer.

    Two per weight and token of every linear layer; 4 * tokens^2 * heads * head size per layer for attention scores and
    their application (the full square, as `torch.utils.flop_counter` counts; a causal kernel does half); and the output
    head for the last token. Norms, activations and rotary embeddings are left out, as usual.

    VisionZip's formula (arXiv:2412.04467), layers * (4nd^2 + 2n^2d + 2ndm), counts one operation per multiply-add and
    an MLP of two matrices; this counts two, and the matrices that are there.
    """
    config = adapter.llm_config
    width = config.num_attention_heads * head_size(adapter)
    flops = 2 * config.hidden_size * config.vocab_size
    for layer, count in zip(adapter.decoder_layers, _by_layer(adapter, tokens), strict=True):
        weights = sum(m.in_features * m.out_features for m in layer.modules() if isinstance(m, nn.Linear))
        flops += 2 * weights * count + 4 * count**2 * width
    return flops


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
