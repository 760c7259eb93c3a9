"""What goes into a model, and what makes it: the processor that every model family has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Int
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase

#: Arguments of a model's forward by name: token ids, masks, pixels and whatever else its family takes.
Inputs: TypeAlias = Mapping[str, Any]
#: Such arguments in a dict of the caller, which may change them.
InputDict: TypeAlias = dict[str, Any]


@runtime_checkable
class ImageProcessor(Protocol):
    """Turns images into the pixels that an encoder takes."""

    image_mean: Sequence[float]
    image_std: Sequence[float]

    def __call__(self, images: object, **settings: object) -> BatchFeature:
        """Return the inputs for images."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return all settings."""
        ...


class Processor(Protocol):
    """Turns texts and images into the inputs of a model, and token ids into text."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: ImageProcessor

    def __call__(self, *args: object, **settings: object) -> BatchFeature:
        """Return the inputs for texts and images."""
        ...

    def apply_chat_template(self, messages: Sequence[Mapping[str, object]], **settings: object) -> str:
        """Return a conversation as the model's template writes it."""
        ...

    def batch_decode(self, ids: Int[Tensor, "rows tokens"], **settings: object) -> list[str]:
        """Return the text of each row of token ids."""
        ...

    def decode(self, ids: Int[Tensor, " tokens"], **settings: object) -> str:
        """Return the text of token ids."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return all settings."""
        ...

    def save_pretrained(self, folder: str | os.PathLike[str]) -> object:
        """Write the files from which it can be loaded again."""
        ...
