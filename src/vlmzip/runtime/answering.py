"""Several questions answered together, greedily, with what each of them cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmzip.errors import UserError
from vlmzip.models.adapter import ModelAdapter
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.flops import prefill_flops
from vlmzip.runtime.prompts import chat_prompt, special_tokens


@dataclass(frozen=True)
class Answer:
    text: str
    visual_tokens: int
    """Of all images of the prompt, without compression."""
    by_layer: tuple[int, ...]
    """Visual tokens left at each layer of the LLM."""
    text_tokens: int
    """Of the prompt."""
    new_tokens: int = 0
    """Of the answer, its end included."""
    positions: int = 0
    """The LLM's positions that prompt and answer take."""

    @property
    def retention(self) -> float:
        """Visual tokens over all layers, as a share of what they would be without compression; 1 without images."""
        return sum(self.by_layer) / (self.visual_tokens * len(self.by_layer)) if self.visual_tokens else 1.0


class Answerer:
    """Makes the inputs of a model from images and questions."""

    def __init__(self, adapter: ModelAdapter, processor: Any) -> None:
        self.adapter, self.processor = adapter, processor
        # Answers of a batch go on where their prompts end; published checkpoints often pad there.
        processor.tokenizer.padding_side = "left"
        self.flops = cache(self._flops)

    def check(self, question: str) -> None:
        """Raises `UserError` for a question that would bring in an image of its own."""
        if "<image>" in question or getattr(self.processor, "image_token", "<image>") in question:
            raise UserError(f"the question {question!r} must not contain <image>: images are placed before it")

    def inputs(self, images: Sequence[Image.Image], questions: Sequence[str]) -> dict[str, Any]:
        """Model inputs of one prompt for each question, with its image, or with its images: as many for each."""
        rows = _shared_out(images, len(questions))
        return self._inputs(self._prompts(questions, rows), rows)

    def answer(
        self, compressed: CompressedModel, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int
    ) -> list[Answer]:
        """The answers in the order of the questions, each about its image, or its images: as many for each."""
        rows = _shared_out(images, len(questions))
        prompts = self._prompts(questions, rows)
        return self.answer_prompts(compressed, prompts, rows, max_new_tokens=max_new_tokens, do_sample=False)

    def answer_prompts(
        self,
        compressed: CompressedModel,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        **generation: Any,
    ) -> list[Answer]:
        """The answers in the order of the prompts, each with equally many images; `generation` is for `generate`."""
        inputs = self._inputs(prompts, images)
        with torch.inference_mode():
            ids = compressed.generate(**inputs, **generation)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        lengths, counts = inputs["attention_mask"].sum(1).tolist(), self._written(compressed, new)
        return [
            self._answer(compressed, row, text.strip(), length, count)
            for row, (text, length, count) in enumerate(zip(texts, lengths, counts, strict=True))
        ]

    def _prompts(self, questions: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> list[str]:
        both = zip(questions, images, strict=True)
        return [chat_prompt(self.adapter, self.processor, question, len(own)) for question, own in both]

    def _inputs(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict[str, Any]:
        """Model inputs of prompts that have their images' places in them."""
        alone = all(len(row) == 1 for row in images)  # processors agree on the form of one image a prompt
        batch: Any = [row[0] for row in images] if alone else [list(row) for row in images]
        batch = batch if any(images) else None
        special = special_tokens(self.processor.tokenizer, prompts[0])  # one template made all
        made = self.processor(images=batch, text=list(prompts), padding=True, return_tensors="pt", **special)
        return dict(made.to(self.adapter.model.device, self.adapter.model.dtype))

    def _answer(self, compressed: CompressedModel, row: int, text: str, length: int, count: int) -> Answer:
        mine = [image for image in compressed.report.images if image.row == row]
        before = sum(image.before for image in mine)
        by_layer = tuple(map(sum, zip(*(image.by_layer for image in mine), strict=True)))
        positions = compressed.report.positions[row] + max(count - 1, 0)  # the last token does not go through the LLM
        return Answer(text, before, by_layer, length - before, count, positions)

    def _written(self, compressed: CompressedModel, new: Tensor) -> list[int]:
        """How many tokens of each row were generated: those up to its first end, which is one of them."""
        config = compressed.generation_config
        ends = torch.as_tensor(config.eos_token_id if config.eos_token_id is not None else -1).flatten()
        ended = torch.isin(new, ends.to(new.device)).long().cumsum(1)
        return ((ended == 0).sum(1) + (ended[:, -1:] > 0).sum(1)).tolist() if new.shape[1] else [0] * len(new)

    def _flops(self, text_tokens: int, by_layer: tuple[int, ...]) -> int:
        """Prefill FLOPs of the LLM."""
        return prefill_flops(self.adapter, [text_tokens + count for count in by_layer])


def _shared_out(images: Sequence[Image.Image], count: int) -> list[Sequence[Image.Image]]:
    """The images of each of `count` prompts, which have equally many."""
    each = len(images) // count
    return [images[start : start + each] for start in range(0, len(images), each)]
