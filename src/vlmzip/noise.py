"""Lines of other libraries that would stand beside our own and concern nothing that the user asked for."""

from __future__ import annotations

import logging


def _concerns_weights(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm")


def silence_bitsandbytes() -> None:
    """Keep bitsandbytes, which transformers and peft import wherever it is installed, from naming a kernel it lacks."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_concerns_weights)
