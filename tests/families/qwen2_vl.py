"""Qwen2-VL: as Qwen2.5-VL without windows."""

from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor

from tests.families.qwen2_5_vl import ImagesOnly, Qwen25VL
from tests.tiny import IMAGE_TOKEN, LLM, VIDEO_TOKEN


class Qwen2Processor(ImagesOnly, Qwen2VLProcessor):
    pass


class Qwen2VL(Qwen25VL):
    name = "qwen2_vl"
    model_class = Qwen2VLForConditionalGeneration
    processor_class = Qwen2Processor
    windowed = False

    @classmethod
    def config(cls, **settings):
        return Qwen2VLConfig(
            vision_config=dict(
                depth=2, embed_dim=32, hidden_size=48, num_heads=4, patch_size=4, spatial_merge_size=2,
                temporal_patch_size=2, mlp_ratio=2,
            ),
            text_config=dict(
                **LLM, bos_token_id=1, eos_token_id=2,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            ),
            image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN, vision_start_token_id=97, vision_end_token_id=96,
            **settings,
        )  # fmt: skip

    def seconds(self, videos):
        return {}
