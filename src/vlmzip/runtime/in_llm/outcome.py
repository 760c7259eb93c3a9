"""What comes out of the LLM: the report of its layers, and the loss on the tokens that are left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Int
from torch import Tensor

from vlmzip.processor import Inputs
from vlmzip.runtime.in_llm.indices import look_up
from vlmzip.runtime.in_llm.state import InLLMState
from vlmzip.runtime.in_llm.step import Step
from vlmzip.runtime.prompt import PER_TOKEN, gather
from vlmzip.runtime.report import Report


def extend(report: Report, steps: Sequence[Step]) -> Report:
    """Return the report with what happened inside the LLM in one step, or in a step for each row in turn.

    Behind one step, `source` follows to the tokens of the last layer.
    """
    maps = [image_maps for step in steps for image_maps in step.maps()]
    images = []
    for image, image_maps in zip(report.images, maps, strict=True):
        by_layer, token_map = list(image.by_layer), image.token_map
        for layer, layer_map in image_maps:
            by_layer[layer:] = [layer_map.lengths[0]] * (len(by_layer) - layer)
            token_map = token_map and token_map.then(layer_map)
        images.append(replace(image, by_layer=tuple(by_layer), token_map=token_map))
    source, here = report.source, steps[0].here()
    if len(steps) == 1 and source is not None and here is not None:
        source = look_up(source[:, -steps[0].length :], here)
    return replace(report, images=images, source=source)


def loss_behind(in_llm: InLLMState, out: Any, labels: Int[Tensor, "batch length"], arguments: Inputs) -> Any:
    """Return the output `out` of a model with its loss on the tokens behind the last layer.

    `labels` are of the prompt that went into the LLM; `arguments` are the call's.
    """
    here = None if in_llm.first is None else in_llm.first.here()
    left = labels if here is None else gather(labels, here, PER_TOKEN["labels"])
    as_tuple = isinstance(out, tuple)
    loss = in_llm.plan.adapter.model.loss_function(
        logits=out[0] if as_tuple else out.logits,
        labels=left,
        vocab_size=in_llm.plan.adapter.llm_config.vocab_size,
        **{name: arguments[name] for name in ("num_items_in_batch",) if name in arguments},
    )
    if as_tuple:
        return (loss, *out)
    return type(out)(**{"loss": loss, **{name: value for name, value in out.items() if name != "loss"}})
