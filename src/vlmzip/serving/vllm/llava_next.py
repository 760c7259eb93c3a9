"""LLaVA-NeXT in vLLM."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import LlavaNextModel, PreTrainedConfig
from vllm.model_executor.models import llava_next as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmzip.models.llava_next import LlavaNext
from vlmzip.serving.vllm.engine import EngineModel, InEngine
from vlmzip.serving.vllm.model import CompressingModel
from vlmzip.serving.vllm.processor import CompressingProcessor
from vlmzip.serving.vllm.setting import of_engine


class EngineLlavaNext(InEngine, LlavaNext):
    """LLaVA-NeXT with the parts of vLLM's model."""


def family_of(config: PreTrainedConfig, model: nn.Module | None = None) -> EngineLlavaNext:
    """Return the family for a checkpoint's config, without weights or with those of vLLM's model."""
    return EngineLlavaNext(EngineModel(config, model, [LlavaNextModel.pack_image_features]))


class LlavaNextProcessor(CompressingProcessor, stock.LlavaNextMultiModalProcessor):
    """vLLM's processor, with the placeholders that remain."""

    family_class = staticmethod(family_of)


def processor(info: Any, dummy_inputs: Any) -> Any:
    """Return the processor with compression, or the stock one if no compressor is configured."""
    compresses = of_engine(info.get_hf_config()) is not None
    return (LlavaNextProcessor if compresses else stock.LlavaNextMultiModalProcessor)(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    processor, info=stock.LlavaNextProcessingInfo, dummy_inputs=stock.LlavaDummyInputsBuilder
)
class LlavaNextForConditionalGeneration(CompressingModel, stock.LlavaNextForConditionalGeneration):
    """vLLM's model, with compression between vision encoder and LLM."""

    family_class = staticmethod(family_of)
