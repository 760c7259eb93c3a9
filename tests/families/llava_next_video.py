"""LLaVA-NeXT-Video: images as in LLaVA-NeXT."""

from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

from tests.families.llava_next import PATCH, PINPOINTS, LlavaNext
from tests.tiny import IMAGE_TOKEN, LLM, VIT


class LlavaNextVideo(LlavaNext):
    name = "llava_next_video"
    model_class = LlavaNextVideoForConditionalGeneration

    @classmethod
    def config(cls, **settings):
        return LlavaNextVideoConfig(
            vision_config=CLIPVisionConfig(**{**VIT, "patch_size": PATCH}),
            text_config=LlamaConfig(**LLM, bos_token_id=1, eos_token_id=2),
            image_token_index=IMAGE_TOKEN,
            video_token_index=98,
            image_grid_pinpoints=PINPOINTS,
            **settings,
        )
