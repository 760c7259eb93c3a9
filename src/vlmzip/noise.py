"""Silence log lines of other libraries that do not concern the user's command."""

from __future__ import annotations

import logging


def _concerns_weights(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Failed to load CPU gemm")


def silence_bitsandbytes() -> None:
    """Stop bitsandbytes from logging that it lacks a CPU kernel; transformers and peft import it if it is installed."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_concerns_weights)


def silence_pipeline(name: str) -> None:
    """Stop transformers' image-text-to-text pipeline from logging that it does not support the model class `name`.

    Other pipelines do not support the façade, and their log lines are correct.
    """
    line = f"The model '{name}' is not supported for image-text-to-text."
    logger = logging.getLogger("transformers.pipelines.base")
    logger.addFilter(lambda record: not record.getMessage().startswith(line))
