"""The prompt that enters the LLM in one call."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxtyping import Bool
from torch import Tensor

from vlmzip.processor import Inputs
from vlmzip.runtime.prompt import Span, question_ends


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
    ends = question_ends([(span.row, span.columns[-1]) for span in spans], real, compressed.get("labels"))
    return Prompt(spans, real, ends)
