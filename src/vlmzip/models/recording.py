"""Attention rows without attention matrices: q and k of one layer, recorded while the model runs as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

#: Recordings of the running thread. Hooks see every thread's forward; they write only into their own.
_recording: ContextVar[Recording | None] = ContextVar("vlmzip_recording", default=None)


@dataclass
class Recording:
    """The outputs of some modules, by the name they were asked under."""

    outputs: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Tensor:
        return self.outputs[name]


@contextmanager
def record(modules: dict[str, nn.Module]) -> Iterator[Recording]:
    """Records what `modules` put out inside the block, for this thread only; leaves no hook behind."""
    recording = Recording()

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            if _recording.get() is recording:
                recording.outputs[name] = output[0] if isinstance(output, tuple) else output

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
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


def mean_over_heads(key: Float[Tensor, "batch tokens dim"], heads: int) -> Float[Tensor, "batch tokens head_dim"]:
    """The attention keys averaged over heads: VisionZip's similarity metric."""
    return _by_head(key, heads).mean(dim=1)


def _by_head(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
