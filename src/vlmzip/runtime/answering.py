"""Answer several questions in one batch, and count the tokens that each answer took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlmzip.errors import UserError
from vlmzip.models.family import Family
from vlmzip.processor import InputDict, Processor
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.flops import prefill_flops
from vlmzip.runtime.prompt_text import chat_prompt, special_tokens
from vlmzip.runtime.token_profile import TokenProfile


@dataclass(frozen=True)
class Answer:
    """An answer and its token counts."""

    text: str
    visual_tokens: int
    """Visual tokens of all images of the prompt, without compression."""
    by_layer: tuple[int, ...]
    """Visual tokens that each layer of the LLM sees."""
    text_tokens: int
    """Text tokens of the prompt."""
    new_tokens: int = 0
    """Tokens of the answer, including its end token."""
    positions: int = 0
    """Positions of the LLM that prompt and answer take."""

    @property
    def retention(self) -> float:
        """Return the retention ratio: visual tokens over all layers, relative to no compression; 1 without images."""
        return sum(self.by_layer) / (self.visual_tokens * len(self.by_layer)) if self.visual_tokens else 1.0


class Answerer:
    """A model's processor with methods that turn images and questions into inputs and answers."""

    def __init__(self, family: Family, processor: Processor) -> None:
        self.family, self.processor = family, processor
        # The answers of a batch continue at the ends of their prompts, where published checkpoints often pad.
        processor.tokenizer.padding_side = "left"
        self.flops = cache(self._flops)

    def check(self, question: str) -> None:
        """Raise `UserError` for a question with a placeholder, which the processor would take for an image."""
        if "<image>" in question or getattr(self.processor, "image_token", "<image>") in question:
            raise UserError(f"the question {question!r} must not contain <image>: images are placed before it")

    def inputs(self, images: Sequence[Image.Image], questions: Sequence[str]) -> InputDict:
        """Return the model inputs of one prompt per question. The images are divided equally, in order."""
        rows = _images_by_prompt(images, len(questions))
        return self._inputs(self._prompts(questions, rows), rows)

    def answer(
        self, compressed: CompressedModel, images: Sequence[Image.Image], questions: Sequence[str], max_new_tokens: int
    ) -> list[Answer]:
        """Answer each question greedily, in order. The images are divided equally among the questions, in order."""
        rows = _images_by_prompt(images, len(questions))
        prompts = self._prompts(questions, rows)
        return self.answer_prompts(compressed, prompts, rows, max_new_tokens=max_new_tokens, do_sample=False)

    def answer_prompts(
        self,
        compressed: CompressedModel,
        prompts: Sequence[str],
        images: Sequence[Sequence[Image.Image]],
        **generation: Any,
    ) -> list[Answer]:
        """Answer each prompt, in order. All prompts have the same number of images; `generation` goes to `generate`."""
        inputs = self._inputs(prompts, images)
        with torch.inference_mode():
            ids = compressed.generate(**inputs, **generation)
        new = ids[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        profiles = TokenProfile.rows(compressed.report, inputs["attention_mask"].sum(1).tolist())
        counts, taken = self._written(compressed, new), compressed.report.positions
        return [
            # The last token of an answer does not go through the LLM.
            Answer(text.strip(), tokens.before, tokens.visual, tokens.text, count, positions + max(count - 1, 0))
            for text, tokens, count, positions in zip(texts, profiles, counts, taken, strict=True)
        ]

    def _prompts(self, questions: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> list[str]:
        pairs = zip(questions, images, strict=True)
        return [chat_prompt(self.family, self.processor, question, len(row)) for question, row in pairs]

    def _inputs(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> InputDict:
        """Return the model inputs of prompts that contain the image placeholders."""
        single = all(len(row) == 1 for row in images)  # all processors accept a flat list of one image per prompt
        batch: list[Image.Image] | list[list[Image.Image]] | None = (
            [row[0] for row in images] if single else [list(row) for row in images]
        )
        batch = batch if any(images) else None
        special = special_tokens(self.processor.tokenizer, prompts[0])  # all prompts come from the same template
        inputs = self.processor(images=batch, text=list(prompts), padding=True, return_tensors="pt", **special)
        return dict(inputs.to(self.family.model.device, self.family.model.dtype))

    def _written(self, compressed: CompressedModel, new: Tensor) -> list[int]:
        """Count the tokens that were generated for each row, up to and including its first end token."""
        config = compressed.generation_config
        ends = torch.as_tensor(config.eos_token_id if config.eos_token_id is not None else -1).flatten()
        ended = torch.isin(new, ends.to(new.device)).long().cumsum(1)
        return ((ended == 0).sum(1) + (ended[:, -1:] > 0).sum(1)).tolist() if new.shape[1] else [0] * len(new)

    def _flops(self, text_tokens: int, by_layer: tuple[int, ...]) -> int:
        """Return the prefill FLOPs of the LLM."""
        return prefill_flops(self.family, [text_tokens + count for count in by_layer])


def _images_by_prompt(images: Sequence[Image.Image], count: int) -> list[Sequence[Image.Image]]:
    """Divide the images equally among `count` prompts, in order."""
    per_prompt = len(images) // count
    return [images[start : start + per_prompt] for start in range(0, len(images), per_prompt)]
