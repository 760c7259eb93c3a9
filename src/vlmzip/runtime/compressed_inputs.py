"""Inputs for a model whose images are compressed: what passes between compressing, packing and the façade."""

from __future__ import annotations

from typing import Any

from vlmzip.processor import Inputs
from vlmzip.runtime.prompt import Span
from vlmzip.runtime.report import Report


class CompressedInputs(dict[str, Any]):
    """Inputs for the model's own `forward` or `generate`, with the `report` of what was done to the images."""

    report: Report
    spans: list[Span]
    """Where the images' tokens stand in the shortened prompt; only for compressors that go on inside the LLM."""
    smaller: Inputs | None = None
    """The inputs with smaller images in them, where the encoder saw such."""
