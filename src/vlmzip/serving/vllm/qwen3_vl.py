"""Qwen3-VL in vLLM: each frame of a video has a timestamp and markers in the prompt."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import BatchFeature, PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.models import qwen3_vl as stock
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataItems

from vlmzip.compressor import Compressor
from vlmzip.models.family import Family
from vlmzip.models.qwen3_vl import Qwen3VL
from vlmzip.serving.vllm.engine import EngineModel
from vlmzip.serving.vllm.qwen import SPAN, InQwenEngine, QwenModel, QwenProcessor
from vlmzip.serving.vllm.setting import KEY

#: How many times the LLM's maximum position the positions of the tokens that remain may be. vLLM has 4 for EVS.
POSITIONS_FACTOR = 4


class EngineQwen3VL(InQwenEngine, Qwen3VL):
    """Qwen3-VL with the parts of vLLM's model."""


def family_of(config: PreTrainedConfig, model: nn.Module | None = None) -> EngineQwen3VL:
    """Return the family for a checkpoint's config, without weights or with those of vLLM's model."""
    return EngineQwen3VL(EngineModel(config, model))


class Qwen3VLProcessor(QwenProcessor, stock.Qwen3VLMultiModalProcessor):
    """vLLM's processor, with the placeholders that remain.

    How many tokens of a frame remain can depend on what the video shows. So a video is a run of placeholders in vLLM's
    prompt, with one for each token of the text between its frames, and the model fills in text and frames.
    """

    family_class = staticmethod(family_of)

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        processed = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        if "timestamps" in processed:
            videos = zip(processed["video_grid_thw"].tolist(), processed["timestamps"], strict=True)
            processed[SPAN] = [self._span(sizes, seconds) for sizes, seconds in videos]
        return processed

    def _span(self, sizes: Sequence[int], timestamps: Sequence[float]) -> torch.Tensor:
        """Return the token ids of a whole video in the prompt."""
        config, (frames, rows, cols) = self.info.get_hf_config(), sizes
        of_frame = rows * cols // config.vision_config.spatial_merge_size**2
        whole = self.get_video_repl(
            tokens_per_frame=[of_frame] * frames,
            timestamps=timestamps,
            tokenizer=self.info.get_tokenizer(),
            vision_start_token_id=config.vision_start_token_id,
            vision_end_token_id=config.vision_end_token_id,
            video_token_id=config.video_token_id,
        )
        return torch.tensor(whole.full)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        if SPAN in hf_inputs:
            fields[SPAN] = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
        return fields

    def count(self, family: Family, compressor: Compressor, item: Mapping[str, Any]) -> int:
        text = 0 if SPAN not in item else int((item[SPAN].data != family.placeholder_id).sum())
        return super().count(family, compressor, item) + text


def processor(info: Any, dummy_inputs: Any) -> Any:
    """Return the processor with compression, or the stock one if no compressor is configured."""
    compresses = hasattr(info.get_hf_config(), KEY)
    return (Qwen3VLProcessor if compresses else stock.Qwen3VLMultiModalProcessor)(info, dummy_inputs)


def _with_more_positions(factor: Any) -> Any:
    """Return vLLM's function for the number of positions of the LLM, with room for those of tokens that remain."""

    @functools.wraps(factor)
    def mrope_positions_factor(vllm_config: VllmConfig) -> int:
        compresses = hasattr(vllm_config.model_config.hf_config, KEY)
        return max(factor(vllm_config), POSITIONS_FACTOR if compresses else 1)

    mrope_positions_factor.has_more_positions = True  # type: ignore[attr-defined]
    return mrope_positions_factor


if not hasattr(stock.mrope_positions_factor, "has_more_positions"):
    stock.mrope_positions_factor = _with_more_positions(stock.mrope_positions_factor)


@MULTIMODAL_REGISTRY.register_processor(
    processor, info=stock.Qwen3VLProcessingInfo, dummy_inputs=stock.Qwen3VLDummyInputsBuilder
)
class Qwen3VLForConditionalGeneration(QwenModel, stock.Qwen3VLForConditionalGeneration):
    """vLLM's model, with compression between vision encoder and LLM."""

    family_class = staticmethod(family_of)
