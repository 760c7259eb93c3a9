"""What transformers' pipelines say about the façade: they know models by the names of their classes."""

from __future__ import annotations

import logging

#: The pipeline that takes the façade as it takes the model; of others it is true that they do not support it.
TASK = "image-text-to-text"


def expect(name: str) -> None:
    """Keep the pipeline from saying, with a list of all classes it knows, that it does not support `name`."""
    said = f"The model '{name}' is not supported for {TASK}."
    logging.getLogger("transformers.pipelines.base").addFilter(lambda record: not record.getMessage().startswith(said))
