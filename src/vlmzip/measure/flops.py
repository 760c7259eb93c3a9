"""Prefill FLOPs and KV-cache bytes of an LLM, counted from its own layers."""

from __future__ import annotations

from torch import nn

from vlmzip.models.adapter import ModelAdapter


def prefill_flops(adapter: ModelAdapter, tokens: int) -> int:
    """Floating-point operations of the LLM for a prompt of `tokens` tokens (text and visual), one row.

    Two per weight and token of every linear layer; 4 * tokens^2 * heads * head size per layer for attention scores and
    their application (the full square, as `torch.utils.flop_counter` counts; a causal kernel does half); and the output
    head for the last token. Norms, activations and rotary embeddings are left out, as usual.

    VisionZip's formula (arXiv:2412.04467), layers * (4nd^2 + 2n^2d + 2ndm), counts one operation per multiply-add and
    an MLP of two matrices; this counts two, and the matrices that are there.
    """
    config = adapter.llm_config
    weights = sum(m.in_features * m.out_features for m in adapter.llm.modules() if isinstance(m, nn.Linear))
    attention = 4 * tokens**2 * config.num_attention_heads * head_size(adapter) * config.num_hidden_layers
    return 2 * weights * tokens + attention + 2 * config.hidden_size * config.vocab_size


def kv_cache_bytes(adapter: ModelAdapter, tokens: int) -> int:
    """Bytes of keys and values that `tokens` tokens take in the LLM's cache, one row, in the model's own precision."""
    config = adapter.llm_config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size(adapter)
    return per_token * tokens * next(adapter.llm.parameters()).element_size()


def head_size(adapter: ModelAdapter) -> int:
    config = adapter.llm_config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
