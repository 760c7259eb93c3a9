"""Turn images into stored images: encode, compress and project them, as an answer about them would."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, refusing
from vlmzip.models.family import Family
from vlmzip.processor import InputDict, Inputs
from vlmzip.runtime.answering import Answerer
from vlmzip.runtime.facade import CompressedModel
from vlmzip.runtime.fitting import before_the_llm, inside_the_llm
from vlmzip.runtime.inputs import compress_inputs, positions_of
from vlmzip.runtime.loading import Loaded
from vlmzip.runtime.prompt import PER_TOKEN
from vlmzip.runtime.prompt_text import chat_prompt
from vlmzip.runtime.report import Stopwatch
from vlmzip.runtime.stages import compress_images
from vlmzip.serving.store.image import Described, StoredImage
from vlmzip.serving.store.prompt import stored_inputs, text_ids

#: The question of the prompts with which images are encoded. Stored tokens do not depend on it.
QUESTION = "What is there?"
#: The advice for models whose images cannot be stored.
ASK_ABOUT_FILES = "ask about the image files instead"


def refuse_unfit(compressor: Compressor) -> None:
    """Raise `UserError` for a method whose tokens cannot be stored."""
    for stage in compressor.stages():
        name = stage.name()
        if stage.text_aware and stage not in inside_the_llm(compressor):
            raise UserError(
                f"{name} reads the question to choose tokens, and a store is made before there are questions; choose a"
                " method that does not"
            )
        if stage.for_training_only:
            raise UserError(f"{name} is for training only; choose another method")
    if inside := inside_the_llm(compressor):
        first = before_the_llm(compressor)
        both = f"store {first[0].name()} alone, and " if first else "store a method that acts before it, and "
        raise UserError(
            f"{inside[0].name()} acts inside the LLM, where tokens depend on the question; {both}give --method"
            f" {inside[0].name()} to vlmzip ask --store"
        )


@dataclass
class Encoder:
    """A model with a compressor that turns images into stored images."""

    loaded: Loaded
    compressed: CompressedModel
    takes_several: bool = field(init=False, default=True)
    """Whether a prompt may have several stored images; `check` finds out."""

    def __post_init__(self) -> None:
        refuse_unfit(self.compressor)
        self._answerer = Answerer(self.family, self.loaded.processor)
        self._answerer.processor.tokenizer.padding_side = "left"

    @property
    def family(self) -> Family:
        return self.loaded.family

    @property
    def compressor(self) -> Compressor:
        """Return the compressor as it acts in the model."""
        return self.compressed.compressor

    @torch.inference_mode()
    def encode(self, images: Sequence[Image.Image]) -> list[StoredImage]:
        """Return the stored image of each of these images, which go through the encoder together.

        Raise `UserError` if the processor or the method refuses one of them.
        """
        with refusing(f"{self.loaded.name}'s processor refuses the image"):
            inputs = self._answerer.inputs(images, [QUESTION] * len(images))
        (each,) = self.family.present_in(inputs)
        compressed, smaller = compress_images(
            each, inputs, self.compressor, Stopwatch(self.family.model.device), self.compressed.resampler,
            ascending=positions_of(self.compressor, each) == "original",
        )  # fmt: skip
        if compressed[0].further:
            raise UserError(
                f"{self.loaded.name} reads more than visual tokens of an image ({min(compressed[0].further)}), which a"
                f" store does not keep; {ASK_ABOUT_FILES}"
            )
        parts = self._prompt_parts(inputs)
        stored = []
        for number, (image, part) in enumerate(zip(compressed, parts, strict=True)):
            as_encoded = None if smaller is None else self._described(smaller, number)
            stored.append(StoredImage.of(image, part, self._described(inputs, number), as_encoded))
        return stored

    def check(self, image: Image.Image) -> None:
        """Raise `UserError` unless a prompt about the stored image is equal to a prompt about the image itself.

        Also find out whether the same holds for two images in a prompt: some processors cut images into tiles only if
        there is one.
        """
        stored = self.encode([image])[0]
        if not self._agrees([image], [stored]):
            raise UserError(
                f"{self.loaded.name}'s processor writes images into prompts in a way that vlmzip does not know;"
                f" {ASK_ABOUT_FILES}"
            )
        self.takes_several = self._agrees([image] * 2, [stored] * 2)

    @torch.inference_mode()
    def _agrees(self, images: Sequence[Image.Image], stored: Sequence[StoredImage]) -> bool:
        """Return whether one prompt about all images is the same with the images and with the stored ones."""
        processor = self.loaded.processor
        try:
            direct = self._answerer.inputs(images, [QUESTION])
        except Exception:  # processors that take one image per prompt raise various errors
            if len(images) == 1:
                raise
            return False
        prompt = chat_prompt(self.family, processor, QUESTION, len(images))
        inputs = stored_inputs(self.family, processor, self.compressor, [prompt], [stored])
        names = PER_TOKEN.keys() & direct.keys() | {"input_ids"}
        if not all(name in inputs and torch.equal(direct[name], inputs[name]) for name in names):
            return False
        (model, first), (_, second) = [(self.compressed.inner, each) for each in (direct, inputs)]
        prepared = [
            compress_inputs(
                model, each, self.compressor, generating=True, family=self.family, resampler=self.compressed.resampler
            )
            for each in (first, second)
        ]
        return all(_same(prepared[0].get(name), prepared[1].get(name)) for name in ("input_ids", "position_ids")) and [
            image.after for image in prepared[0].report.images
        ] == [len(image.places) for image in stored]

    def _prompt_parts(self, inputs: Inputs) -> list[dict[str, Tensor]]:
        """Return the part of each row of the prompt that stands for its image, of each input with a value per token."""
        prompt = chat_prompt(self.family, self.loaded.processor, QUESTION, 1)
        (text,) = text_ids(self.loaded.processor, [prompt])
        placeholder = self.family.placeholder_id
        before = text.index(placeholder) if placeholder in text else 0
        after = len(text) - before - 1
        names = [name for name in ("input_ids", *PER_TOKEN) if name in inputs and name != "attention_mask"]
        parts = []
        for row, mask in enumerate(inputs["attention_mask"].bool()):
            values = {name: inputs[name][row][mask].cpu() for name in names}
            parts.append({name: value[before : len(value) - after].int() for name, value in values.items()})
        return parts

    def _described(self, inputs: InputDict | Inputs, number: int) -> Described:
        """Return what positions depend on: nothing, unless they have several axes."""
        if not self.family.position_axes:
            return Described({}, (1,))
        chosen = self.family.choose_images(inputs, [number])
        pixels, *others = self.family.image_inputs
        return Described({name: chosen[name].cpu() for name in others if name in chosen}, tuple(chosen[pixels].shape))


def _same(first: Tensor | None, second: Tensor | None) -> bool:
    return first is second or (first is not None and second is not None and torch.equal(first, second))
