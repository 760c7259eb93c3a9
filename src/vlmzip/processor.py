"""What goes into a model, and what makes it: the processor that every model family has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

from jaxtyping import Int
from torch import Tensor

#: Arguments of a model's forward by name: token ids, masks, pixels and whatever else its family takes.
Inputs: TypeAlias = Mapping[str, Any]


class Processor(Protocol):
    """Turns texts and images into the inputs of a model, and token ids into text."""

    tokenizer: Any
    image_processor: Any

    def __call__(self, *args: object, **settings: object) -> Any:
        """Return the inputs for texts and images."""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **settings: object) -> Any:
        """Return a conversation as the model's template writes it."""

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
