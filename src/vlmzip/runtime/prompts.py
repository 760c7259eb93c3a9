"""The text of one conversation turn: all pictures, then the question."""

from __future__ import annotations

from typing import Any

from vlmzip.models.adapter import ModelAdapter


def chat_prompt(adapter: ModelAdapter, processor: Any, question: str, pictures: int) -> str:
    """The prompt by the processor's chat template, or the family's own form where the checkpoint has none."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"} for _ in range(pictures)] + [{"type": "text", "text": question}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return adapter.prompt(question, pictures)
