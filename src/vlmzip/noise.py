"""Silence log lines of other libraries that do not concern the user's command."""

from __future__ import annotations

import logging


def _concerns_weights(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm")


def silence_bitsandbytes() -> None:
    """Stop bitsandbytes from logging that it lacks a CPU kernel; transformers and peft import it if it is installed."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_concerns_weights)
