"""LLaVA-NeXT: LLaVA's encoder sees a base image and tiles, 3 x 3 tokens each; a newline ends each row of the tiles."""

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.families.llava import Llava
from tests.tiny import IMAGE_TOKEN, LLM, SIDE, VIT, noise, tiny_tokenizer

PATCH = 16
PINPOINTS = [[48, 96], [96, 48], [96, 96], [48, 144]]


class LlavaNext(Llava):
    name = "llava_next"
    leads = True
    model_class = LlavaNextForConditionalGeneration
    one_size = False
    patch = PATCH
    projects_padding = True
    seed = 2
    #: Height and width of image 0, 1, …; the last repeats. The padding of the second takes 2 of 3 rows of each tile.
    sizes = ((40, 90), (20, 120), (40, 90), (30, 110))
    #: Rows and columns of their tiles.
    tiles = ((1, 2), (1, 3), (1, 2), (1, 3))
    #: Rows and columns of the tiles' tokens that are left of the padding.
    seen = ((3, 6), (1, 9), (3, 6), (3, 9))

    @classmethod
    def config(cls, **settings):
        return LlavaNextConfig(
            vision_config=CLIPVisionConfig(**{**VIT, "patch_size": cls.patch}),
            text_config=LlamaConfig(**LLM, bos_token_id=1, eos_token_id=2),
            image_token_index=IMAGE_TOKEN,
            image_grid_pinpoints=PINPOINTS,
            **settings,
        )

    @classmethod
    def processor(cls):
        size = {"shortest_edge": SIDE}
        images = LlavaNextImageProcessorPil(
            size=size, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=PINPOINTS
        )
        return LlavaNextProcessor(images, tiny_tokenizer(), cls.patch, "default", num_additional_image_tokens=1)

    def tokens(self, image):
        """The base image's 9, those of the tiles, and a newline for each of their rows."""
        rows, cols = self.of_image(self.seen, image)
        return (SIDE // self.patch) ** 2 + rows * (cols + 1)

    def views(self, image):
        rows, cols = self.of_image(self.tiles, image)
        return 1 + rows * cols

    def separators(self, image):
        rows, cols = self.of_image(self.seen, image)
        return [(SIDE // self.patch) ** 2 + row * (cols + 1) + cols for row in range(rows)]

    def pixels_of_views(self, inputs):
        return torch.cat([pixels[: self.views(n)] for n, pixels in enumerate(inputs["pixel_values"])])

    def pixels(self, images):
        sizes = [self.of_image(self.sizes, image) for image in images]
        pixels = torch.stack([noise(image, 5, 3, SIDE, SIDE) for image in images])
        return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
