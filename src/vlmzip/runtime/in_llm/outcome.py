"""The results of a call with compression inside the LLM: the report, and the loss on the remaining tokens."""

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
from vlmzip.token_map import TokenMap


def extend(report: Report, steps: Sequence[Step]) -> Report:
    """Return the report, extended by the compression inside the LLM.

    `steps` has a single step for all rows, or one step per row with images. With a single step, `source` then describes
    the tokens of the last layer.
    """
    maps = [image_maps for step in steps for image_maps in step.maps()]
    # Tokens that are restored after each layer enter the last layer as they entered the LLM.
    followed = [image_maps[-1:] for image_maps in maps] if steps[0].plan.restores else maps
    token_maps = _followed([image.token_map for image in report.images], followed)
    images = []
    for image, token_map, image_maps in zip(report.images, token_maps, maps, strict=True):
        by_layer = list(image.by_layer)
        for layer, layer_map in image_maps:
            by_layer[layer:] = [layer_map.lengths[0]] * (len(by_layer) - layer)
        images.append(replace(image, by_layer=tuple(by_layer), token_map=token_map))
    source, here = report.source, steps[0].here()
    if len(steps) == 1 and source is not None and here is not None:
        source = look_up(source[:, -steps[0].length :], here)
    return replace(report, images=images, source=source)


def _followed(
    token_maps: Sequence[TokenMap | None], later: Sequence[Sequence[tuple[int, TokenMap]]]
) -> list[TokenMap | None]:
    """Return the map of each image, composed with its maps inside the LLM.

    Images with equal token counts at all layers are handled together.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for image, (token_map, layers) in enumerate(zip(token_maps, later, strict=True)):
        if token_map is not None:
            counts = (token_map.group.shape[1], *(layer_map.group.shape[1] for _, layer_map in layers))
            groups.setdefault(counts, []).append(image)
    followed: list[TokenMap | None] = [None] * len(token_maps)
    for images in groups.values():
        first = [token_map for image in images if (token_map := token_maps[image]) is not None]
        together = TokenMap.stack(first)
        for layer in range(len(later[images[0]])):
            together = together.then(TokenMap.stack([later[image][layer][1] for image in images]))
        for image, token_map in zip(images, together.split(), strict=True):
            followed[image] = token_map
    return followed


def loss_behind(in_llm: InLLMState, out: Any, labels: Int[Tensor, "batch length"], arguments: Inputs) -> Any:
    """Return the output `out` of a model, with the loss on the tokens that remain after the last layer.

    `labels` belong to the prompt that entered the LLM, and `arguments` are those of the call.
    """
    here = None if in_llm.first is None else in_llm.first.here()
    left = labels if here is None else gather(labels, here, PER_TOKEN["labels"])
    as_tuple = isinstance(out, tuple)
    loss = in_llm.plan.family.model.loss_function(
        logits=out[0] if as_tuple else out.logits,
        labels=left,
        vocab_size=in_llm.plan.family.llm_config.vocab_size,
        **{name: arguments[name] for name in ("num_items_in_batch",) if name in arguments},
    )
    if as_tuple:
        return (loss, *out)
    return type(out)(**{"loss": loss, **{name: value for name, value in out.items() if name != "loss"}})
