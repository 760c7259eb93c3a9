"""Qwen3-VL, images only: as Qwen2.5-VL without windows; the first layers of the LLM get features, too (deepstack)."""

from __future__ import annotations

from vlmzip.models.qwen2_5_vl import Qwen25VL


class Qwen3VL(Qwen25VL):
    """`Qwen3VLForConditionalGeneration`.

    Behind each of its first layers the LLM adds features of earlier vision blocks to the visual tokens: streams, which
    follow the map of the tokens. Inside the LLM tokens can go from the layer behind the last stream on.
    """

    model_types = ("qwen3_vl",)
    example = "Qwen/Qwen3-VL-8B-Instruct"
    has_streams = True

    @property
    def first_free_layer(self) -> int:
        return max(1, len(self.model.config.vision_config.deepstack_visual_indexes))
