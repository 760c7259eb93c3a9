"""The prompt that enters the LLM in one call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from vlmzip.processor import Inputs
from vlmzip.runtime.prompt import PER_TOKEN, Span


@dataclass(frozen=True)
class Prompt:
    """The parts of a prompt that compressors inside the LLM need: its images, padding and questions."""

    spans: list[Span]
    """The images. Columns count from the beginning of the conversation."""
    real: Bool[Tensor, "batch length"]
    """True for the tokens of the conversation that are not padding."""
    question_ends: list[int]
    """The last column of each image's question: the token before the next label, or the last token of the row."""

    def row(self, row: int) -> Prompt:
        """Return one row of the prompt as a prompt with a single row."""
        images = [n for n, span in enumerate(self.spans) if span.row == row]
        spans = [replace(self.spans[n], row=0) for n in images]
        return Prompt(spans, self.real[row : row + 1], [self.question_ends[n] for n in images])


def prompt_of(spans: list[Span], compressed: Inputs) -> Prompt | None:
    """Return the prompt that enters the LLM with `compressed`; `None` if it has no images."""
    if not spans:
        return None
    real = compressed["attention_mask"].bool()
    last = (real.long() * torch.arange(1, real.shape[1] + 1, device=real.device)).argmax(1).tolist()
    ends = [last[span.row] for span in spans]
    labels = compressed.get("labels")
    if labels is not None:
        # In training, the question about an image ends before the first answer that follows the image.
        known = real.shape[1] - labels.shape[1]  # labels cover the new part of a conversation
        answers = [(row != PER_TOKEN["labels"]).nonzero()[:, 0] + known for row in labels.cpu()]
        for n, span in enumerate(spans):
            following = answers[span.row][answers[span.row] > span.columns[-1]]
            ends[n] = int(following[0]) - 1 if len(following) else ends[n]
    return Prompt(spans, real, ends)
