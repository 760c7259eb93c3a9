"""Several questions answered together, greedily, with what each of them cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from PIL import Image

from vlmzip.errors import UserError
from vlmzip.measure.flops import prefill_flops
from vlmzip.models.adapter import ModelAdapter
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.prompts import chat_prompt


@dataclass(frozen=True)
class Answer:
    text: str
    visual_tokens: int
    """Without compression."""
    by_layer: tuple[int, ...]
    """Visual tokens left at each layer of the LLM."""
    text_tokens: int


class Asker:
    """Makes the inputs of a model from pictures and questions."""

    def __init__(self, adapter: ModelAdapter, processor: Any) -> None:
        self.adapter, self.processor = adapter, processor
        # Answers of a batch go on where their prompts end; published checkpoints often pad there.
        processor.tokenizer.padding_side = "left"
        self.flops = cache(self._flops)

    def check(self, question: str) -> None:
        """Raises `UserError` for a question that would bring in a picture of its own."""
        if "<image>" in question or getattr(self.processor, "image_token", "<image>") in question:
            raise UserError(f"the question {question!r} must not contain <image>: pictures are placed before it")

    def inputs(self, pictures: Sequence[Image.Image], questions: Sequence[str]) -> dict[str, Any]:
        """Model inputs of one prompt for each question, with its picture, or with its pictures: as many for each."""
        each = len(pictures) // len(questions)
        prompts = [chat_prompt(self.adapter, self.processor, question, each) for question in questions]
        made = self.processor(images=list(pictures), text=prompts, padding=True, return_tensors="pt")
        return dict(made.to(self.adapter.model.device, self.adapter.model.dtype))

    def answer(
        self, small: CompressedModel, pictures: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int
    ) -> list[Answer]:
        """The answers in the order of the questions; tokens are those of all pictures of a prompt."""
        inputs = self.inputs(pictures, questions)
        with torch.inference_mode():
            ids = small.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        lengths = inputs["attention_mask"].sum(1).tolist()
        found = []
        for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
            own = [picture for picture in small.report.pictures if picture.row == row]
            before = sum(picture.before for picture in own)
            by_layer = tuple(map(sum, zip(*(picture.by_layer for picture in own), strict=True)))
            found.append(Answer(text.strip(), before, by_layer, length - before))
        return found

    def _flops(self, text_tokens: int, by_layer: tuple[int, ...]) -> int:
        """Prefill FLOPs of the LLM."""
        return prefill_flops(self.adapter, [text_tokens + count for count in by_layer])
