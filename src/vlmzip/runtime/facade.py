"""What `attach` returns: the model with a compressor before its LLM, used like the model itself."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, closest
from vlmzip.methods import NoCompression
from vlmzip.models import adapter_for
from vlmzip.runtime.prepare import CompressedInputs, compress_inputs
from vlmzip.runtime.report import Report


def attach(model: nn.Module, compressor: Compressor) -> CompressedModel:
    """The same model, answering with fewer visual tokens.

    Nothing on `model` is changed: it can be used beside the result, and in several of them with different compressors.
    Raises `UserError` for a model that vlmzip cannot compress, or a compressor that has no place in it.
    """
    return CompressedModel(model, compressor)


@contextmanager
def attached(model: nn.Module, compressor: Compressor) -> Iterator[CompressedModel]:
    """`attach` for a block; the result is detached at its end, also after an exception."""
    small = attach(model, compressor)
    try:
        yield small
    finally:
        small.detach()


class CompressedModel(nn.Module):
    """A vision-language model whose pictures go through a compressor; holds the model as `inner`.

    `forward` and `generate` take what the model takes. What is not defined here is looked up on the model.
    """

    def __init__(self, model: nn.Module, compressor: Compressor) -> None:
        super().__init__()
        if isinstance(model, CompressedModel):
            raise UserError("this model already has a compressor: detach() it first, or attach to the plain model")
        if not isinstance(compressor, Compressor):
            raise UserError(f"{compressor!r} is no compressor; try vlmzip.VisionZip(keep=64)")
        adapter = adapter_for(model)
        if compressor.site not in adapter.sites:
            raise UserError(
                f"{type(model).__name__} has no site {compressor.site.value!r}{closest(compressor.site, adapter.sites)}"
            )
        self.inner: Any = model
        self.compressor = compressor
        self._adapter = adapter
        self._report: Report | None = None
        self._detached = False
        self.train(model.training)
        _warn_if_nothing_to_do(compressor, adapter)

    @property
    def report(self) -> Report:
        """What the last `forward` or `generate` with pictures did. Raises `UserError` before the first."""
        if self._report is None:
            raise UserError("there is no report yet: call the model with a picture first")
        return self._report

    def detach(self) -> nn.Module:
        """Ends the façade and returns the plain model. Detaching twice is harmless."""
        self._detached = True
        return self.inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own `forward` on the compressed inputs; logits cover the compressed sequence."""
        named = inspect.signature(self.inner.forward).bind_partial(*args).arguments
        return self.inner(**self._compress({**named, **kwargs}))

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:
        """The model's own `generate`; returns the original prompt followed by the new tokens."""
        if inputs is not None:
            kwargs["input_ids"] = inputs
        small = self._compress(kwargs)
        if small.report.source is None:
            return self.inner.generate(**small)
        prompt: Tensor = kwargs["input_ids"]
        removed = prompt.shape[1] - small["input_ids"].shape[1]
        self._keep_length_limits(small, removed)
        out = self.inner.generate(**small)
        if isinstance(out, Tensor):
            return _with_prompt(out, prompt, removed)
        out.sequences = _with_prompt(out.sequences, prompt, removed)
        return out

    def _compress(self, inputs: dict[str, Any]) -> CompressedInputs:
        if self._detached:
            raise UserError("this model was detached; call vlmzip.attach(model, compressor) again")
        small = compress_inputs(self.inner, inputs, self.compressor, adapter=self._adapter)
        if small.report.pictures:
            self._report = small.report
        return small

    def _keep_length_limits(self, arguments: dict[str, Any], removed: int) -> None:
        """Lets `max_length` and `min_length` count the prompt as the user sees it."""
        config = arguments.get("generation_config") or getattr(self.inner, "generation_config", None)
        for limit, new_tokens in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            if arguments.get(new_tokens) is not None or getattr(config, new_tokens, None) is not None:
                continue
            value = arguments.get(limit)
            value = getattr(config, limit, None) if value is None else value
            if value is not None and (limit in arguments or value != DEFAULT_LIMITS[limit]):
                arguments[limit] = max(value - removed, 0)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "inner":
                raise
            return getattr(self.inner, name)


#: Values of an untouched generation config; `generate` counts those from the end of the prompt by itself.
DEFAULT_LIMITS = {"max_length": 20, "min_length": 0}


def _with_prompt(sequences: Tensor, prompt: Tensor, removed: int) -> Tensor:
    """Puts the original prompt in place of the shortened one, once for each returned sequence."""
    new_tokens = sequences[:, prompt.shape[1] - removed :]
    prompt = prompt.to(sequences.device).repeat_interleave(len(sequences) // len(prompt), dim=0)
    return torch.cat([prompt, new_tokens], dim=1)


def _warn_if_nothing_to_do(compressor: Compressor, adapter: Any) -> None:
    grid = adapter.profile().grid
    count = compressor.token_count(grid)
    if count is not None and count >= grid.size and not isinstance(compressor, NoCompression):
        warnings.warn(
            f"{compressor.name()} keeps {count} tokens, a picture has {grid.size}: it changes nothing", stacklevel=4
        )
