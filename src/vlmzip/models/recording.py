"""Attention rows without attention matrices: q and k of one layer, recorded while the model runs as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

#: Recordings of the running thread. Hooks see every thread's forward; they write only into their own.
_recording: ContextVar[Recording | None] = ContextVar("vlmzip_recording", default=None)


@dataclass
class Recording:
    """What some modules put out and were given, by the names they were asked under."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.outputs[name]


@contextmanager
def record(modules: dict[str, nn.Module], arguments: dict[str, nn.Module] | None = None) -> Iterator[Recording]:
    """Records what `modules` put out inside the block, for this thread only; leaves no hook behind.

    Of the modules in `arguments` it records the keyword arguments that they are called with.
    """
    recording = Recording()

    def output_hook(name: str) -> Callable[[nn.Module, object, Any], None]:
        def keep(_module: nn.Module, _args: object, output: Any) -> None:
            if _recording.get() is recording:
                recording.outputs[name] = output[0] if isinstance(output, tuple) else output

        return keep

    def argument_hook(name: str) -> Callable[[nn.Module, object, Any], None]:
        def keep(_module: nn.Module, _args: object, keywords: Any) -> None:
            if _recording.get() is recording:
                recording.arguments[name] = dict(keywords)

        return keep

    handles = [module.register_forward_hook(output_hook(name)) for name, module in modules.items()]
    for name, module in (arguments or {}).items():
        handles.append(module.register_forward_pre_hook(argument_hook(name), with_kwargs=True))
    token = _recording.set(recording)
    try:
        yield recording
    finally:
        _recording.reset(token)
        for handle in handles:
            handle.remove()


def cls_attention_row(
    query: Float[Tensor, "batch tokens dim"], key: Float[Tensor, "batch tokens dim"], heads: int, scale: float
) -> Float[Tensor, "batch tokens"]:
    """The attention of token 0 to every token, mean over heads: one row per head, never the matrix.

    `query` and `key` are the projections' outputs, unscaled, heads side by side. Computed in float32.
    """
    first = _by_head(query[:, :1].float(), heads)
    scores = first @ _by_head(key.float(), heads).transpose(2, 3) * scale
    return scores.softmax(dim=-1).mean(dim=1)[:, 0]


def attention_received(
    query: Float[Tensor, "batch tokens dim"],
    key: Float[Tensor, "batch tokens dim"],
    heads: int,
    scale: float,
    chunk: int = 256,
) -> Float[Tensor, "batch tokens"]:
    """The attention that each token gets, mean over heads and over all tokens that attend (VisionZip, A.2).

    For encoders without CLS. Every query is needed, but only `chunk` of them at a time: memory grows with the tokens,
    not with their square. Computed in float32.
    """
    queries, keys = _by_head(query.float(), heads), _by_head(key.float(), heads).transpose(2, 3)
    total = torch.zeros(key.shape[:2], device=key.device)
    for part in queries.split(chunk, dim=2):
        total += (part @ keys * scale).softmax(dim=-1).sum(dim=2).mean(dim=1)
    return total / key.shape[1]


def attention_rows(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    allowed: Bool[Tensor, "batch queries keys"],
    scale: float,
    chunk: int = 32,
) -> Float[Tensor, "batch queries keys"]:
    """The attention of some queries to all keys, mean over heads, where the mask allows it; other rows are never made.

    `query` and `key` as the kernel gets them, rotated; several query heads may share a key head. Computed in float32.
    """
    shared = query.shape[1] // key.shape[1]
    keys = key.float().transpose(2, 3)[:, :, None]
    rows = []
    for part, mask in zip(query.split(chunk, dim=2), allowed.split(chunk, dim=1), strict=True):
        scores = part.float().unflatten(1, (-1, shared)) @ keys * scale
        rows.append(scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(dim=-1).nan_to_num().mean(dim=(1, 2)))
    return torch.cat(rows, dim=1)


def rotate(
    x: Float[Tensor, "*batch dim"], cos: Float[Tensor, "*batch dim"], sin: Float[Tensor, "*batch dim"]
) -> Tensor:
    """Rotary positions: each pair of entries, half the width apart, turned by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def mean_over_heads(key: Float[Tensor, "batch tokens dim"], heads: int) -> Float[Tensor, "batch tokens head_dim"]:
    """The attention keys averaged over heads: VisionZip's similarity metric."""
    return _by_head(key, heads).mean(dim=1)


def _by_head(x: Tensor, heads: int) -> Tensor:
    by_head: Tensor = x.unflatten(-1, (heads, -1))
    return by_head.transpose(1, 2)
