"""The model's part: encode the images of a batch, compress their tokens, and project what remains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.methods import RandomTokens
from vlmzip.models.family import Family
from vlmzip.processor import Inputs
from vlmzip.serving.vllm import setting
from vlmzip.serving.vllm.engine import Remaining, batch_of_one, compressed, of_images
from vlmzip.serving.vllm.processor import features_of, field_of, places_of

logger = init_logger(f"vllm.{__name__}")

#: Requests use few settings, and each batch has one.
read = lru_cache(maxsize=256)(spec.read)

#: The most views that go through the vision encoder in one call. vLLM counts the tokens that remain, so few tokens per
#: image would let it send hundreds of images at once.
MOST_VIEWS = 64


class CompressingModel(nn.Module):
    """A mixin for a model of vLLM. It goes before the stock class, and acts only if a compressor is configured."""

    family_class: ClassVar[Any]
    """A function from the checkpoint's config and this model to the family."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        self.compresses = setting.of_engine(config) is not None
        if self.compresses:
            self.compute_dtype = vllm_config.model_config.dtype
            # LoRA of the vision encoder counts the tokens that leave it, and we encode more than remain.
            self.supports_tower_connector_lora = False
            self._families = [self.family_class(config, self).modalities]  # in a list: not a submodule

    @property
    def families(self) -> Sequence[Family]:
        """The family for images, and for videos if it knows them."""
        return self._families[0]

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Return the remaining tokens of each image, in order. Precomputed embeddings stay as they are."""
        if self.compresses:
            for family in self.families:
                if (text := kwargs.pop(field_of(family.modality), None)) is not None:
                    with gpu_sync_allowed():  # methods read numbers from the GPU
                        return self._rows(family, kwargs, read(setting.from_tensor(text)))
        return super().embed_multimodal(**kwargs)  # type: ignore[misc]

    def _rows(self, family: Family, kwargs: Inputs, compressor: Compressor) -> list[Tensor]:
        """Return for each image a row for each placeholder in the prompt."""
        return [image.features for image in self.remaining(family, kwargs, compressor)]

    def remaining(self, family: Family, kwargs: Inputs, compressor: Compressor) -> list[Remaining]:
        """Return the projected tokens that remain of each image. The processor may have encoded and compressed it."""
        if (features := kwargs.get(features_of(family.modality))) is not None:
            return [Remaining(*both) for both in zip(features, kwargs[places_of(family.modality)], strict=True)]
        inputs = {name: kwargs[name] for name in family.image_inputs if kwargs.get(name) is not None}
        parts = self._parts(family, inputs)
        return [image for part in parts for image in self._part(family, part, compressor)]

    def _part(self, family: Family, inputs: Inputs, compressor: Compressor) -> Sequence[Remaining]:
        """Return the remaining tokens of images of one call.

        An error here would end the engine for all requests. So if the compressor raises one, each image keeps random
        tokens, as many as its prompt has placeholders for.
        """
        try:
            return compressed(family, inputs, compressor)
        except torch.OutOfMemoryError:
            raise
        except Exception:
            logger.exception("%s failed: its images keep random tokens", spec.write(compressor))
        images = []
        for number, count in enumerate(setting.counts(family.layouts(inputs), compressor)):
            image = self._image(family, inputs, number)
            images += compressed(family, image, RandomTokens(keep=count, positions=compressor.positions))
        return images

    def _image(self, family: Family, inputs: Inputs, number: int) -> Inputs:
        """Return the inputs of a single image."""
        return of_images(inputs, number, number + 1)

    def _parts(self, family: Family, inputs: Inputs) -> Iterator[Inputs]:
        """Yield the inputs of some images at a time, with at most `MOST_VIEWS` views unless one image has more."""
        pixels = inputs[family.image_inputs[0]]
        if family.modality == "video" and isinstance(pixels, list):  # their numbers of frames differ
            yield from (batch_of_one({name: inputs[name][n] for name in inputs}) for n in range(len(pixels)))
            return
        views = [len(layout.views) for layout in family.layouts(inputs)]
        start, total = 0, 0
        for number, count in enumerate(views):
            if number > start and total + count > MOST_VIEWS:
                yield of_images(inputs, start, number)
                start, total = number, 0
            total += count
        yield inputs if start == 0 else of_images(inputs, start, len(views))
