"""Qwen3-VL: as Qwen2.5-VL without windows; one stream of deepstack, which the LLM adds behind its first layer."""

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from tests.families.qwen2_5_vl import ImagesOnly, Qwen25VL
from tests.tiny import IMAGE_TOKEN, LLM, VIDEO_TOKEN


class Qwen3Processor(ImagesOnly, Qwen3VLProcessor):
    pass


class Qwen3VL(Qwen25VL):
    name = "qwen3_vl"
    leads = True
    model_class = Qwen3VLForConditionalGeneration
    processor_class = Qwen3Processor
    windowed = False
    streams = (0,)

    @classmethod
    def config(cls, streams=streams, **settings):
        return Qwen3VLConfig(
            vision_config=dict(
                depth=4, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=4, spatial_merge_size=2,
                temporal_patch_size=2, out_hidden_size=48, num_position_embeddings=36,
                deepstack_visual_indexes=list(streams),
            ),
            text_config=dict(
                **LLM, bos_token_id=1, eos_token_id=2, head_dim=8,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            ),
            image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN, vision_start_token_id=97, vision_end_token_id=96,
            **settings,
        )  # fmt: skip

    def video_ids(self, video):
        """A timestamp and a marker before each frame, and a marker behind it."""
        frames, rows, cols = self.clip(video)
        of_frames = [[20 + frame, 21, 97, *[VIDEO_TOKEN] * (rows * cols), 96] for frame in range(frames)]
        return [token for ids in of_frames for token in ids]

    def seconds(self, videos):
        return {}
