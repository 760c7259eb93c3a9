"""Fit of the façade into transformers' pipelines, which recognise models by class name."""

from __future__ import annotations

import logging

#: The task of the only pipeline that supports the façade. Other pipelines do not, and their errors are correct.
TASK = "image-text-to-text"


def expect(name: str) -> None:
    """Suppress the log record in which this pipeline says that it does not support the class `name`."""
    said = f"The model '{name}' is not supported for {TASK}."
    logging.getLogger("transformers.pipelines.base").addFilter(lambda record: not record.getMessage().startswith(said))
