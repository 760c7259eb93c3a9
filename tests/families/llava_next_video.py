"""LLaVA-NeXT-Video: LLaVA-NeXT, and videos whose frames have 6 x 6 patches, pooled to 3 x 3 tokens."""

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.families.llava_next import PINPOINTS, LlavaNext
from tests.families.qwen2_5_vl import ImagesOnly
from tests.tiny import IMAGE_TOKEN, LLM, SIDE, VIDEO_TOKEN, VIT, tiny_tokenizer


class Processor(ImagesOnly, LlavaNextVideoProcessor):
    pass


class LlavaNextVideo(LlavaNext):
    name = "llava_next_video"
    model_class = LlavaNextVideoForConditionalGeneration
    patch = 8
    sizes = ((40, 90), (20, 120), (40, 90), (34, 110))
    seen = ((6, 12), (4, 18), (6, 12), (6, 18))
    clips = ((4, 3, 3),)

    @classmethod
    def config(cls, **settings):
        return LlavaNextVideoConfig(
            vision_config=CLIPVisionConfig(**{**VIT, "patch_size": cls.patch}),
            text_config=LlamaConfig(**LLM, bos_token_id=1, eos_token_id=2),
            image_token_index=IMAGE_TOKEN,
            video_token_index=VIDEO_TOKEN,
            image_grid_pinpoints=PINPOINTS,
            **settings,
        )

    @classmethod
    def processor(cls):
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": SIDE},
            crop_size={"height": SIDE, "width": SIDE},
            image_grid_pinpoints=PINPOINTS,
        )
        return Processor(
            None, images, tiny_tokenizer(), patch_size=cls.patch, vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )  # fmt: skip
