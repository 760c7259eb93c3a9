"""LLaVA-NeXT-Video, images only: it sees an image as LLaVA-NeXT does."""

from __future__ import annotations

from vlmzip.models.llava_next import LlavaNext


class LlavaNextVideo(LlavaNext):
    """`LlavaNextVideoForConditionalGeneration`."""

    model_types = ("llava_next_video",)
    example = "llava-hf/LLaVA-NeXT-Video-7B-hf"
