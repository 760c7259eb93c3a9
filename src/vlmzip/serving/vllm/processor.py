"""The processor's part: how many placeholders remain of each image, and the setting that goes to the model with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalInput
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import EmbeddingItems, MultiModalDataItems
from vllm.multimodal.processing import (
    BaseMultiModalProcessor,
    ProcessorInputs,
    PromptReplacement,
    PromptUpdate,
    TimingContext,
)

from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError
from vlmzip.models.family import Family, Modality
from vlmzip.processor import InputDict
from vlmzip.serving.vllm import setting
from vlmzip.serving.vllm.encoder import encoder_of
from vlmzip.serving.vllm.engine import batch_of_one
from vlmzip.serving.vllm.setting import DEFAULT, KEY, VERSION_KEY, Traits
from vlmzip.serving.vllm.trial import for_trial, try_out
from vlmzip.version import __version__
from vlmzip.visual_tokens import Grid

#: The number of settings, each with a size of images, that we remember to have tried.
MOST_TRIED = 4096


def field_of(modality: Modality) -> str:
    """Return the name of the model input with the setting for images or videos."""
    return f"{KEY}_{modality}"


def features_of(modality: Modality) -> str:
    """Return the name of the model input with the tokens that the processor has encoded and compressed."""
    return f"{KEY}_{modality}_features"


def places_of(modality: Modality) -> str:
    """Return the name of the model input with the placeholders whose positions these tokens take."""
    return f"{KEY}_{modality}_places"


class CompressingProcessor(BaseMultiModalProcessor):
    """A mixin for a processor of vLLM. It goes before the stock class.

    The setting is part of the keyword arguments from which vLLM computes the key of an image in all of its caches, so
    no cache mixes settings. It is also an input of the model, shared by the images of a batch: vLLM gives
    each setting a batch of its own.
    """

    family_class: ClassVar[Any]
    """A function from the checkpoint's config to the family, without weights."""
    traits: ClassVar[Traits] = DEFAULT
    """What a compressor can do in the model."""

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        if KEY in (info.ctx.get_mm_config().mm_processor_kwargs or {}):
            raise UserError(f"{KEY} in --mm-processor-kwargs is for requests: give the engine's to --hf-overrides")
        self.default = spec.read(str(setting.of_engine(info.get_hf_config())))
        """The compressor of the engine."""
        self.encodes = self._needs_encoder(self.default)
        """True if requests may use the vision encoder of transformers, because the engine's compressor needs it."""
        self._tried: set[tuple[Compressor, Modality, tuple[Grid, ...], int]] = set()

    @cached_property
    def families(self) -> Sequence[Family]:
        """The family for images, and for videos if it knows them. They know shapes only."""
        modalities: Sequence[Family] = self.family_class(self.info.get_hf_config()).modalities
        return modalities

    def compressor_of(self, kwargs: Mapping[str, object]) -> Compressor:
        """Return the compressor of a request with these keyword arguments. Raise `UserError` if it cannot run."""
        text = kwargs.get(KEY)
        if text is None:
            return self.default
        if not isinstance(text, str):
            raise UserError(f"{KEY} must be a text, such as 'visionzip(keep=64)', got {text!r}")
        named = frozenset(stage.name() for stage in self.default.stages())
        compressor = setting.read_request(text, self.traits, named)
        if not self.encodes and self._needs_encoder(compressor):
            raise UserError(
                f"{compressor.name()} needs the vision encoder in the processor, and a server has it there that was"
                f" started with such a method; {setting.USE}"
            )
        return compressor

    def _needs_encoder(self, compressor: Compressor) -> bool:
        return setting.needs_processor(compressor, self.families[0].profile(), self.traits)

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        """Return the inputs that tell vLLM the largest number of tokens of an image."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        if not self.encodes:
            return inputs
        return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, KEY: "no_compression"})

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        try:
            text = spec.write(self.compressor_of(inputs.hf_processor_mm_kwargs))
            kwargs = {**inputs.hf_processor_mm_kwargs, KEY: text, VERSION_KEY: __version__}
            return super().apply(replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)
        except UserError as error:  # vLLM's server answers 400 to its own class
            raise VLLMValidationError(str(error), parameter=KEY) from error

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        processed = super()._apply_hf_processor_main(mm_items, _without_setting(hf_kwargs))
        compressor = spec.read(str(hf_kwargs[KEY]))
        for family in self.families:
            if (pixels := family.image_inputs[0]) not in processed:
                continue
            if self._needs_encoder(compressor):
                encoder = encoder_of(self.info.ctx.model_config)
                images = encoder.remaining(family.modality, self.encoder_inputs(family, processed), compressor)
                processed[features_of(family.modality)] = [image.features for image in images]
                processed[places_of(family.modality)] = [image.places for image in images]
                del processed[pixels]
            processed[field_of(family.modality)] = setting.to_tensor(str(hf_kwargs[KEY]))
        return processed

    def encoder_inputs(self, family: Family, processed: InputDict) -> Iterator[InputDict]:
        """Yield the inputs of each call of the vision encoder of transformers, from the outputs of the processor.

        Override it if they lack a step that vLLM's model does, or if images should go through the encoder one by one.
        """
        inputs = {name: processed[name] for name in family.image_inputs if processed.get(name) is not None}
        if isinstance(pixels := inputs[family.image_inputs[0]], list):  # videos whose numbers of frames differ
            yield from (batch_of_one({name: inputs[name][n] for name in inputs}) for n in range(len(pixels)))
        else:
            yield inputs

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, _without_setting(hf_processor_mm_kwargs)))
        for family in self.families:
            if (field := field_of(family.modality)) in hf_inputs:
                count = self.item_count(hf_inputs, family)
                fields[field] = MultiModalFieldConfig.shared(family.modality, count, keep_on_cpu=True)
            fields[features_of(family.modality)] = MultiModalFieldConfig.batched(family.modality)
            fields[places_of(family.modality)] = MultiModalFieldConfig.batched(family.modality, keep_on_cpu=True)
        return fields

    def item_count(self, hf_inputs: Mapping[str, Any], family: Family) -> int:
        """Return the number of images or videos among the outputs of the processor.

        Override it if the first of `image_inputs` does not have one entry for each.
        """
        features = features_of(family.modality)
        return len(hf_inputs[features if features in hf_inputs else family.image_inputs[0]])

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(mm_items, _without_setting(hf_processor_mm_kwargs), out_mm_kwargs)
        compressor = spec.read(str(hf_processor_mm_kwargs[KEY]))
        families = {family.modality: family for family in self.families}
        return [
            self._shortened(update, families[update.modality], compressor, out_mm_kwargs.get(update.modality, ()))
            if update.modality in families and not isinstance(mm_items.get(update.modality), EmbeddingItems)
            else update
            for update in updates
        ]

    def _shortened(
        self, update: PromptUpdate, family: Family, compressor: Compressor, items: Sequence[Any]
    ) -> PromptUpdate:
        """Return a replacement with the placeholders that remain of each image."""
        return PromptReplacement(
            modality=update.modality,
            target=update.target,
            replacement=lambda item: [family.placeholder_id] * self.count(family, compressor, items[item]),
        )

    def count(self, family: Family, compressor: Compressor, item: Mapping[str, Any]) -> int:
        """Return the number of placeholders that remain of an image, from the outputs of the processor for it.

        Raise `UserError` if the compressor cannot act on the image.
        """
        if (features := item.get(features_of(family.modality))) is not None:
            return len(features.data)
        (layout,) = layouts = family.layouts(self.inputs_of(family, item))
        trial = for_trial(layout)
        tried = (compressor, family.modality, trial.views, trial.placeholders)
        if tried not in self._tried:
            try_out(compressor, trial)
            if len(self._tried) >= MOST_TRIED:
                self._tried.clear()
            self._tried.add(tried)
        (count,) = setting.counts(layouts, compressor)
        return count

    def inputs_of(self, family: Family, item: Mapping[str, Any]) -> InputDict:
        """Return the inputs of one image, as a batch, from the outputs of the processor for it."""
        return batch_of_one({name: item[name].data for name in family.image_inputs if name in item})


def _without_setting(kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return keyword arguments for the stock processor, which does not know the setting."""
    return {name: value for name, value in kwargs.items() if name not in (KEY, VERSION_KEY)}
