"""The state that compressors inside the LLM keep during one call of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models.family import Family
from vlmzip.runtime.in_llm.plan import Plan
from vlmzip.runtime.in_llm.prompt import Prompt
from vlmzip.runtime.in_llm.step import Step
from vlmzip.runtime.report import Stopwatch


class InLLMState:
    """The state of one call of the model, from its first forward of the LLM to the last step of `generate`."""

    def __init__(
        self,
        family: Family,
        compressors: Sequence[Compressor],
        prompt: Prompt | None,
        watch: Stopwatch,
        keys: dict[int, Int[Tensor, "batch _"]] | None = None,
        sizes: dict[int, Int[Tensor, "batch _"]] | None = None,
    ) -> None:
        self.plan = Plan(family, compressors, watch)
        self.prompt = prompt
        self.keys = dict(keys or {})
        """The conversation columns in the cache of each compressing layer (see `LayerCut.keys`)."""
        self.sizes = dict(sizes or {})
        """The number of tokens that each of these stands for, if tokens are restored after layers."""
        self.first: Step | None = None
        """The first step with images."""
        self._started = False
        self._cache: Any = None
        """The KV cache of the call; `None` before the first step, and in calls without a cache."""

    def row(self, row: int) -> InLLMState:
        """Return the state of a call with only one row of the prompt."""
        prompt = None if self.prompt is None else self.prompt.row(row)
        keys = {layer: held[row : row + 1] for layer, held in self.keys.items()}
        sizes = {layer: held[row : row + 1] for layer, held in self.sizes.items()}
        return InLLMState(self.plan.family, self.plan.compressors, prompt, self.plan.watch, keys, sizes)

    def step(self, embeddings: Float[Tensor, "batch length dim"], cache: Any) -> Step | None:
        """Return the state of one forward of the LLM; `None` if no layer has anything to do.

        Raise `UserError` for a cache that this call cannot use.
        """
        if self._started and cache is not self._cache:
            _refuse_part_of_another_cache(cache)
            return None  # another forward, for example from the logits processor of guidance_scale
        past = 0 if cache is None else cache.get_seq_length()
        prompt = self._prompt_for(embeddings.shape[1], past)
        self._started, self._cache = True, cache
        if past == 0:
            self.keys, self.sizes = {}, {}
        if prompt is None and not self.keys:
            return None
        _refuse_other_caches(cache)
        step = Step(self.plan, self.keys, self.sizes, prompt, embeddings.detach(), cache, past)
        if step.images is not None and self.first is None:
            self.first = step
        return step

    def _prompt_for(self, length: int, past: int) -> Prompt | None:
        """Return the prompt that enters the LLM in this forward, or `None`.

        Without a KV cache, the whole prompt enters in every step, with the new tokens after it.
        """
        if not self._started:
            return self.prompt
        if past or self.prompt is None:
            return None
        new = length - self.prompt.real.shape[1]
        if new < 0:
            raise UserError(
                "the KV cache was not filled, so this answer cannot continue: call model.eval() before generate, or"
                " switch off gradient checkpointing"
            )
        return replace(self.prompt, real=nn.functional.pad(self.prompt.real, (0, new), value=True))


def _refuse_other_caches(cache: Any) -> None:
    """Raise `UserError` for a cache whose layers cannot hold different numbers of tokens."""
    if cache is None:
        return
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
        raise UserError(
            f"compressors inside the LLM need a DynamicCache of full-attention layers, not {type(cache).__name__}:"
            " layers hold different numbers of tokens"
        )


def _refuse_part_of_another_cache(cache: Any) -> None:
    """Raise `UserError` if another cache than this call's holds fewer tokens in some layers than in others."""
    if cache is None:
        return
    if len({cache.get_seq_length(layer) for layer in range(len(cache.layers))}) > 1:
        raise UserError(
            "a compressor inside the LLM can only continue the KV cache that it filled, not a copy of it:"
            " use generate without custom_generate, or a compressor before the LLM"
        )
