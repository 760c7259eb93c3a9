"""Types for the inputs of a model and for the processor that makes them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Int
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase

#: Arguments of a model's forward by name: token ids, masks, pixels and others that its family takes.
Inputs: TypeAlias = Mapping[str, Any]
#: The same arguments in a dict that the receiver may change.
InputDict: TypeAlias = dict[str, Any]


@runtime_checkable
class ImageProcessor(Protocol):
    """An image processor, which turns images into the pixels that an encoder takes."""

    image_mean: Sequence[float]
    image_std: Sequence[float]

    def __call__(self, images: object, **settings: object) -> BatchFeature:
        """Return the image inputs of the model."""
        ...

    def to_dict(self) -> dict[str, object]:
        """Return all settings."""
        ...


class Processor(Protocol):
    """A processor, which turns texts and images into the inputs of a model, and token ids into text."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: ImageProcessor

    def __call__(self, *args: object, **settings: object) -> BatchFeature:
        """Return the inputs of the model for texts and images."""
        ...

    def apply_chat_template(self, messages: Sequence[Mapping[str, object]], **settings: object) -> str:
        """Return the text of a conversation, formatted with the model's chat template."""
        ...

    def batch_decode(self, ids: Int[Tensor, "rows tokens"], **settings: object) -> list[str]:
        """Return the text of each row of token ids."""
        ...

    def decode(self, ids: Int[Tensor, " tokens"], **settings: object) -> str:
        """Return the text of a sequence of token ids."""
        ...

    def to_dict(self) -> dict[str, object]:
        """Return all settings."""
        ...

    def save_pretrained(self, folder: str | os.PathLike[str]) -> object:
        """Write the files from which the processor can be loaded again."""
        ...
