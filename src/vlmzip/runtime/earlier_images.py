"""Images that were compressed earlier, such as those of a store: a prompt gets them without the vision encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models.family import Family
from vlmzip.processor import InputDict, Inputs
from vlmzip.runtime.fitting import before_the_llm
from vlmzip.runtime.report import CompressedImage

#: The argument of `compress_inputs`, and of an attached model's `forward` and `generate`, that has the images.
ARGUMENT = "compressed_images"


@dataclass(frozen=True)
class EarlierImages:
    """The images of a prompt, compressed earlier by the same model."""

    images: Sequence[CompressedImage]
    """The images in order of appearance."""
    inputs: Inputs
    """The model's image inputs, from which a family counts positions. Pixels have shapes only: their device is meta."""
    compressor: Compressor
    """The compressor that they come from."""
    smaller: Inputs | None = None
    """The image inputs after a compressor made the images smaller, as `inputs`; `None` for other compressors."""

    def described_in(self, inputs: Inputs, family: Family, compressor: Compressor) -> InputDict:
        """Return `inputs` with the image inputs.

        Raise `UserError` if `inputs` has images of its own, or if `compressor` would have compressed these ones in
        another way.
        """
        if family.present_in(inputs):
            raise UserError(f"give pixels or {ARGUMENT}, not both: a prompt's images are all new or all compressed")
        if _compression(compressor) != _compression(self.compressor):
            raise UserError(
                f"these images were compressed by {self.compressor!r}, and the model has {compressor!r}: attach the"
                " former; methods inside the LLM can be added to it"
            )
        if inputs.get("position_ids") is not None:
            raise UserError(f"leave out position_ids with {ARGUMENT}; vlmzip counts the positions")
        return {**inputs, **self.inputs}

    @classmethod
    def joined(cls, parts: Sequence[EarlierImages]) -> EarlierImages:
        """Return the images of several prompts, one after another, all from the same compressor."""
        images = [image for part in parts for image in part.images]
        smaller = [part.smaller for part in parts if part.smaller is not None]
        inputs = _rows_of([part.inputs for part in parts])
        return cls(images, inputs, parts[0].compressor, _rows_of(smaller) if smaller else None)


def _rows_of(parts: Sequence[Inputs]) -> InputDict:
    """Return the image inputs of all parts, one after another."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _compression(compressor: Compressor) -> tuple[object, ...]:
    """Return all that decides which tokens a compressor leaves before the LLM, and in which order."""
    return compressor.positions, *before_the_llm(compressor)
