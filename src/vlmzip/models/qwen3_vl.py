"""Qwen3-VL: Qwen2.5-VL without windows, with image features added in the first LLM layers (deepstack)."""

from __future__ import annotations

from vlmzip.models.qwen2_5_vl import Qwen25VL


class Qwen3VL(Qwen25VL):
    """`Qwen3VLForConditionalGeneration`.

    After each of its first layers, the LLM adds features of earlier vision blocks to the visual tokens. Inside the LLM,
    tokens can be dropped after the layer that adds the last of them. In the prompt, the placeholders of each frame of a
    video have a timestamp and a marker before them, and a marker after them.
    """

    model_types = ("qwen3_vl",)
    video_inputs = ("pixel_values_videos", "video_grid_thw")
    example = "Qwen/Qwen3-VL-8B-Instruct"
