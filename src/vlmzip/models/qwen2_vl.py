"""Qwen2-VL: Qwen2.5-VL without windows in the encoder."""

from __future__ import annotations

from vlmzip.models.qwen2_5_vl import Qwen25VL


class Qwen2VL(Qwen25VL):
    """`Qwen2VLForConditionalGeneration`."""

    model_types = ("qwen2_vl",)
    video_inputs = ("pixel_values_videos", "video_grid_thw")
    example = "Qwen/Qwen2-VL-7B-Instruct"
