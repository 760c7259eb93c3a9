"""Mini-Gemini: CLIP makes 36 patches, each looks up details in 4 x 4 features of a ConvNeXt."""

import torch
from transformers import CLIPVisionConfig, ConvNextConfig, LlamaConfig

from tests.tiny import IMAGE_TOKEN, LLM, PATCH, SIDE, VIT, Family, noise, tiny_tokenizer
from vlmzip.mini_gemini import (
    MiniGeminiConfig,
    MiniGeminiForConditionalGeneration,
    MiniGeminiImageProcessor,
    MiniGeminiProcessor,
)

#: The features below each patch, per side. Each is made of 4 pixels.
WINDOW = 4


class MiniGemini(Family):
    name = "mini_gemini"
    seed = 2
    model_class = MiniGeminiForConditionalGeneration
    patch = PATCH
    image_grid = 1

    @classmethod
    def config(cls, **settings):
        return MiniGeminiConfig(
            vision_config=CLIPVisionConfig(**{**VIT, "patch_size": cls.patch}),
            text_config=LlamaConfig(**LLM, bos_token_id=1, eos_token_id=2),
            aux_config=ConvNextConfig(hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], layer_scale_init_value=1.0),
            image_token_index=IMAGE_TOKEN,
            image_grid=cls.image_grid,
            **settings,
        )

    @classmethod
    def aux_side(cls):
        return SIDE // cls.patch * WINDOW * 4 * cls.image_grid

    @classmethod
    def processor(cls):
        side = cls.aux_side()
        images = MiniGeminiImageProcessor(
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            view_size=SIDE,
            image_grid=cls.image_grid,
        )
        return MiniGeminiProcessor(images, tiny_tokenizer(), patch_size=cls.patch)

    def pixels(self, images):
        views = (self.views(0),) if self.image_grid > 1 else ()
        side = self.aux_side()
        return {
            "pixel_values": torch.stack([noise(image, *views, 3, SIDE, SIDE) for image in images]),
            "pixel_values_aux": torch.stack([noise(1000 + image, 3, side, side) for image in images]),
        }

    def pixels_of_views(self, inputs):
        return inputs["pixel_values"].flatten(0, -4)

    def encoded(self, inputs):
        model = self.model.model
        patches = model.vision_tower(self.pixels_of_views(inputs), output_hidden_states=True).hidden_states[-2][:, 1:]
        return model.with_details(patches, inputs["pixel_values_aux"])
