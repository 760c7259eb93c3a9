"""The inputs for a model whose images are compressed, as compression, packing and the façade exchange them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmzip.processor import Inputs
from vlmzip.runtime.prompt import Span
from vlmzip.runtime.report import Report


class CompressedInputs(dict[str, Any]):
    """Inputs for the model's own `forward` or `generate`, with a `report` of what was done to the images."""

    report: Report
    spans: list[Span]
    """The places of the images' tokens in the shortened prompt; empty unless a compressor acts inside the LLM."""
    smaller: Inputs | None = None
    """The inputs with the images that the encoder saw, if the compressor resizes images before the encoder.

    `None` otherwise, and in later turns of a conversation.
    """
    counted: tuple[Tensor, Tensor] | None = None
    """The positions that were counted for `position_ids`, and the position of each row's next token, both from 0.

    If tokens keep their positions, these are the positions of the uncompressed prompt. `None` if none were counted.
    """
