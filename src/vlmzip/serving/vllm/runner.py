"""vLLM's runners ask a model of the plugin for the positions of each chunk of a prompt."""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.worker.gpu.model_states import default, mm_pruning
from vllm.v1.worker.gpu_model_runner import GPUModelRunner


def take_over_positions() -> None:
    """Let vLLM's runners ask a model of the plugin for the positions of each chunk of a prompt, as they do for EVS.

    In the V1 runner, EVS would also encode videos one by one, and the CPU's runner does not know EVS. So the flag is
    set only while features are gathered.
    """
    gather, create = GPUModelRunner._gather_mm_embeddings, default.maybe_create_mm_pruner
    if hasattr(gather, "asks_for_positions"):
        return

    @functools.wraps(gather)
    def gather_mm_embeddings(runner: Any, *args: Any, **kwargs: Any) -> Any:
        before = runner.is_multimodal_pruning_enabled
        runner.is_multimodal_pruning_enabled = before or keeps_positions(runner.get_model())
        try:
            return gather(runner, *args, **kwargs)
        finally:
            runner.is_multimodal_pruning_enabled = before

    @functools.wraps(create)
    def create_mm_pruner(model_config: Any, model: Any, rope_state: Any, encoder_cache: Any) -> Any:
        if keeps_positions(model) and rope_state is not None and encoder_cache is not None:
            return mm_pruning.MultiModalPruner(model, rope_state, encoder_cache, model_config.get_inputs_embeds_size())
        return create(model_config, model, rope_state, encoder_cache)

    gather_mm_embeddings.asks_for_positions = True  # type: ignore[attr-defined]
    GPUModelRunner._gather_mm_embeddings = gather_mm_embeddings
    default.maybe_create_mm_pruner = create_mm_pruner


def keeps_positions(model: object) -> bool:
    """Return True for a model of the plugin whose features have positions."""
    return bool(getattr(model, "vlmzip_positions", False))
