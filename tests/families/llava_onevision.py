"""LLaVA-OneVision: LLaVA-NeXT with a SigLIP; the tiles' tokens beyond two tiles' are interpolated to fewer."""

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from tests.families.llava_next import PATCH, PINPOINTS, LlavaNext
from tests.families.qwen2_5_vl import ImagesOnly
from tests.tiny import IMAGE_TOKEN, LLM, SIDE, VIDEO_TOKEN, VIT, tiny_tokenizer

LIMIT = "anyres_max_2"


class Processor(ImagesOnly, LlavaOnevisionProcessor):
    pass


class LlavaOnevision(LlavaNext):
    name = "llava_onevision"
    model_class = LlavaOnevisionForConditionalGeneration
    scored_by = "all tokens"
    feature_layers = (-1,)
    clips = ((3, 2, 2),)
    #: As LlavaNext's, but the fourth image's 3 x 9 tokens are interpolated.
    seen = ((3, 6), (1, 9), (3, 6), (2, 7))

    @classmethod
    def config(cls, **settings):
        return LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(**{**VIT, "patch_size": PATCH}, vision_use_head=False),
            text_config=Qwen2Config(**LLM, bos_token_id=1, eos_token_id=2),
            image_token_index=IMAGE_TOKEN,
            video_token_index=VIDEO_TOKEN,
            image_grid_pinpoints=PINPOINTS,
            vision_aspect_ratio=LIMIT,
            **settings,
        )

    @classmethod
    def processor(cls):
        images = LlavaOnevisionImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS)
        return Processor(
            images, tiny_tokenizer(), num_image_tokens=(SIDE // PATCH) ** 2, vision_feature_select_strategy="full",
            vision_aspect_ratio=LIMIT,
        )  # fmt: skip

    def pixels(self, images):
        """With the number of images of each row, as if no row had several."""
        return {**super().pixels(images), "batch_num_images": torch.tensor([1] * len(images))}

    def video_ids(self, video):
        """A newline follows each video."""
        return [*super().video_ids(video), VIDEO_TOKEN]

    def views(self, image):
        """The interpolated tiles are one view."""
        return 2 if image >= 3 else super().views(image)

    def pixels_of_views(self, inputs):
        counts = [1 + rows * cols for rows, cols in (self.of_image(self.tiles, n) for n in range(4))]
        return torch.cat([pixels[: counts[min(n, 3)]] for n, pixels in enumerate(inputs["pixel_values"])])

    def encoded(self, inputs):
        """Projected: before the projector the model has nothing that it interpolates."""
        return self.model.model.multi_modal_projector(super().encoded(inputs))
