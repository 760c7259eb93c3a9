"""Attention rows without attention matrices, from queries and keys recorded in an unchanged model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vlmzip.processor import InputDict

#: The recording of the current thread. Hooks run in every thread's forward, so each writes only to its own recording.
_recording: ContextVar[Recording | None] = ContextVar("vlmzip_recording", default=None)


class _Stopped(Exception):
    """A private signal that ends a recorded block."""


@dataclass
class Recording:
    """The recorded outputs, first inputs and keyword arguments of modules, by the names given to `record`."""

    outputs: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, InputDict] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.outputs[name]


@contextmanager
def record(
    modules: dict[str, nn.Module], called: dict[str, nn.Module] | None = None, *, stop_at: str | None = None
) -> Iterator[Recording]:
    """Record the outputs of `modules`, and the first input and the keyword arguments of `called`, inside the block.

    The block ends where the module of `called` with the name `stop_at` is called; that module does not run. Only this
    thread's calls are recorded. A later call replaces an earlier one. All hooks are removed at the end.
    """
    recording = Recording()

    def output_hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def keep(_module: nn.Module, _args: object, output: object) -> None:
            if _recording.get() is recording:
                recording.outputs[name] = output[0] if isinstance(output, tuple) else output

        return keep

    def call_hook(name: str) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
        def keep(_module: nn.Module, args: tuple[object, ...], keywords: dict[str, object]) -> None:
            if _recording.get() is recording:
                recording.inputs[name] = next(iter((*args, *keywords.values())), None)
                recording.arguments[name] = dict(keywords)
                if name == stop_at:
                    raise _Stopped

        return keep

    handles = [module.register_forward_hook(output_hook(name)) for name, module in modules.items()]
    for name, module in (called or {}).items():
        # Before the hooks of others, which may prepare a call that will not come.
        handles.append(module.register_forward_pre_hook(call_hook(name), prepend=True, with_kwargs=True))
    token = _recording.set(recording)
    try:
        yield recording
    except _Stopped:
        pass  # a recording inside this block has been left, so the hook was this recording's
    finally:
        _recording.reset(token)
        for handle in handles:
            handle.remove()


def cls_attention_row(
    query: Float[Tensor, "batch tokens dim"], key: Float[Tensor, "batch tokens dim"], heads: int, scale: float
) -> Float[Tensor, "batch tokens"]:
    """Return the attention of token 0 to every token, mean over heads, without computing the attention matrix.

    `query` and `key` are the unscaled outputs of the projections, with heads concatenated. Computed in float32.
    """
    first = _by_head(query[:, :1].float(), heads)
    scores = first @ _by_head(key.float(), heads).transpose(2, 3) * scale
    return scores.softmax(dim=-1).mean(dim=1)[:, 0]


def attention_received(
    query: Float[Tensor, "batch tokens dim"],
    key: Float[Tensor, "batch tokens dim"],
    heads: int,
    scale: float,
    chunk: int = 128,
    mask: Float[Tensor, "_ _ tokens tokens"] | None = None,
) -> Float[Tensor, "batch tokens"]:
    """Return the attention that each token receives, mean over heads and over all attending tokens (VisionZip, A.2).

    This is the score for encoders without CLS. `mask` is what the encoder adds to its scores; the mean is over the
    tokens that may attend, without padding, which no token may attend to. The function processes `chunk` queries at a
    time, so that memory grows with the number of tokens and not with its square. On a CPU it processes each head by
    itself, so that a chunk fits the cache: at 2,880 tokens this takes less than a third of the time. Computed in
    float32.
    """
    queries, keys = _by_head(query.float() * scale, heads), _by_head(key.float(), heads).transpose(2, 3)
    group = 1 if query.device.type == "cpu" else heads
    count = torch.tensor(key.shape[1], device=key.device)
    masks: Iterable[Tensor | None] = repeat(None)
    attends = None
    if mask is not None:
        allowed = mask > torch.finfo(mask.dtype).min / 2
        allowed = allowed & allowed.any(2)[..., None]  # no attention from padding
        attends, count = allowed.any(-1, keepdim=True), allowed.sum(2)[:, 0].clamp(min=1)
        masks = mask.expand(-1, heads, -1, -1).split(group, 1)
    total = torch.zeros(key.shape[:2], device=key.device)
    for q, k, added in zip(queries.split(group, 1), keys.split(group, 1), masks, strict=False):
        for start in range(0, q.shape[2], chunk):
            rows = slice(start, start + chunk)
            scores = q[:, :, rows] @ k
            attention = (scores if added is None else scores + added[:, :, rows]).softmax(dim=-1)
            total += (attention if attends is None else attention * attends[:, :, rows]).sum(dim=(1, 2))
    return total / (heads * count)


def attention_rows(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    allowed: Bool[Tensor, "batch queries keys"],
    scale: float,
    chunk: int = 32,
) -> Float[Tensor, "batch queries keys"]:
    """Return the attention of some queries to all allowed keys, mean over heads, without computing other rows.

    `query` and `key` are rotated, as the attention kernel gets them; several query heads may share a key head. A query
    with no allowed key gets zeros. Computed in float32.
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
    """Apply rotary positions: rotate each pair of entries, half the width apart, by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def mean_over_heads(key: Float[Tensor, "batch tokens dim"], heads: int) -> Float[Tensor, "batch tokens head_dim"]:
    """Return the attention keys averaged over heads, which VisionZip compares by similarity."""
    return _by_head(key, heads).mean(dim=1)


def _by_head(x: Tensor, heads: int) -> Tensor:
    by_head: Tensor = x.unflatten(-1, (heads, -1))
    return by_head.transpose(1, 2)
