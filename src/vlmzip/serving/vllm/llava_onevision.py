"""LLaVA-OneVision in vLLM, with images and videos."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import LlavaOnevisionModel, PreTrainedConfig
from vllm.model_executor.models import llava_onevision as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmzip.models.llava_onevision import LlavaOnevision, LlavaOnevisionFrames
from vlmzip.processor import Inputs
from vlmzip.serving.vllm.engine import EngineModel, InEngine
from vlmzip.serving.vllm.model import CompressingModel
from vlmzip.serving.vllm.processor import CompressingProcessor
from vlmzip.serving.vllm.setting import of_engine


class EngineFrames(InEngine, LlavaOnevisionFrames):
    """The videos of LLaVA-OneVision with the parts of vLLM's model."""


class EngineLlavaOnevision(InEngine, LlavaOnevision):
    """LLaVA-OneVision with the parts of vLLM's model."""

    video_family = EngineFrames

    def _has_tiles(self, inputs: Inputs) -> list[bool]:
        """Return for each image whether the processor made tiles: in a row of several images it makes none."""
        return [len(views) > 1 for views in inputs["pixel_values"]]


def family_of(config: PreTrainedConfig, model: nn.Module | None = None) -> EngineLlavaOnevision:
    """Return the family for a checkpoint's config, without weights or with those of vLLM's model."""
    methods = [LlavaOnevisionModel.pack_image_features, LlavaOnevisionModel.apply_pooling]
    return EngineLlavaOnevision(EngineModel(config, model, methods))


class LlavaOnevisionProcessor(CompressingProcessor, stock.LlavaOnevisionMultiModalProcessor):
    """vLLM's processor, with the placeholders that remain."""

    family_class = staticmethod(family_of)


def processor(info: Any, dummy_inputs: Any) -> Any:
    """Return the processor with compression, or the stock one if no compressor is configured."""
    compresses = of_engine(info.get_hf_config()) is not None
    return (LlavaOnevisionProcessor if compresses else stock.LlavaOnevisionMultiModalProcessor)(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    processor, info=stock.LlavaOnevisionProcessingInfo, dummy_inputs=stock.LlavaOnevisionDummyInputsBuilder
)
class LlavaOnevisionForConditionalGeneration(CompressingModel, stock.LlavaOnevisionForConditionalGeneration):
    """vLLM's model, with compression between vision encoder and LLM."""

    family_class = staticmethod(family_of)
