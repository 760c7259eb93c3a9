"""LLaVA-1.5 in vLLM."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from vllm.model_executor.models import llava as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmzip.models.llava import Llava
from vlmzip.serving.vllm.engine import EngineModel, InEngine
from vlmzip.serving.vllm.model import CompressingModel
from vlmzip.serving.vllm.processor import CompressingProcessor
from vlmzip.serving.vllm.setting import of_engine


class EngineLlava(InEngine, Llava):
    """LLaVA-1.5 with the parts of vLLM's model."""


def family_of(config: PreTrainedConfig, model: nn.Module | None = None) -> EngineLlava:
    """Return the family for a checkpoint's config, without weights or with those of vLLM's model."""
    return EngineLlava(EngineModel(config, model))


class LlavaProcessor(CompressingProcessor, stock.LlavaMultiModalProcessor):
    """vLLM's processor, with the placeholders that remain."""

    family_class = staticmethod(family_of)


def processor(info: Any, dummy_inputs: Any) -> Any:
    """Return the processor with compression, or the stock one if no compressor is configured."""
    if of_engine(info.get_hf_config()) is None:
        return stock._build_llava_or_pixtral_hf_processor(info, dummy_inputs)
    return LlavaProcessor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(
    processor, info=stock._build_llava_or_pixtral_hf_info, dummy_inputs=stock.LlavaDummyInputsBuilder
)
class LlavaForConditionalGeneration(CompressingModel, stock.LlavaForConditionalGeneration):
    """vLLM's model, with compression between vision encoder and LLM."""

    family_class = staticmethod(family_of)
