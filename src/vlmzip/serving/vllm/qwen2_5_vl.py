"""Qwen2.5-VL in vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from vllm.model_executor.models import qwen2_5_vl as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from vlmzip.models.qwen2_5_vl import Qwen25VL
from vlmzip.serving.vllm.engine import EngineModel
from vlmzip.serving.vllm.qwen import InQwenEngine, QwenModel, QwenProcessor, dummy_text
from vlmzip.serving.vllm.setting import KEY


class EngineQwen25VL(InQwenEngine, Qwen25VL):
    """Qwen2.5-VL with the parts of vLLM's model."""


def family_of(config: PreTrainedConfig, model: nn.Module | None = None) -> EngineQwen25VL:
    """Return the family for a checkpoint's config, without weights or with those of vLLM's model."""
    return EngineQwen25VL(EngineModel(config, model))


class Qwen25VLProcessor(QwenProcessor, stock.Qwen2_5_VLMultiModalProcessor):
    """vLLM's processor, with the placeholders that remain."""

    family_class = staticmethod(family_of)


class DummyInputs(stock.Qwen2_5_VLDummyInputsBuilder):
    """vLLM's inputs for its trial run; with a compressor, the images stand between tokens of text."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        compresses = hasattr(self.info.get_hf_config(), KEY)
        return dummy_text(self.info, mm_counts) if compresses else super().get_dummy_text(mm_counts)


def processor(info: Any, dummy_inputs: Any) -> Any:
    """Return the processor with compression, or the stock one if no compressor is configured."""
    compresses = hasattr(info.get_hf_config(), KEY)
    return (Qwen25VLProcessor if compresses else stock.Qwen2_5_VLMultiModalProcessor)(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(processor, info=stock.Qwen2_5_VLProcessingInfo, dummy_inputs=DummyInputs)
class Qwen2_5_VLForConditionalGeneration(QwenModel, stock.Qwen2_5_VLForConditionalGeneration):
    """vLLM's model, with compression between vision encoder and LLM."""

    family_class = staticmethod(family_of)
