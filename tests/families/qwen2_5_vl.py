"""Qwen2.5-VL: images of any grid, M-RoPE; the encoder attends in windows of 2 x 2 merged tokens, then fully."""

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.tiny import IMAGE_TOKEN, LLM, SIDE, VIDEO_TOKEN, Family, noise, tiny_tokenizer


class ImagesOnly:
    """A processor without its part for videos, which needs torchvision."""

    def check_argument_for_proper_class(self, name, part):
        return type(part)


class Qwen25Processor(ImagesOnly, Qwen2_5_VLProcessor):
    pass


class Qwen25VL(Family):
    name = "qwen2_5_vl"
    model_class = Qwen2_5_VLForConditionalGeneration
    processor_class = Qwen25Processor
    grids = ((4, 6), (5, 3), (4, 6), (6, 7))
    clips = ((3, 4, 3), (2, 3, 5), (4, 4, 3))
    one_size = False
    scored_by = "all tokens"
    windowed = True
    position_axes = (3,)
    packs_rows = False

    @classmethod
    def config(cls, **settings):
        return Qwen2_5_VLConfig(
            vision_config=dict(
                depth=2, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=4, spatial_merge_size=2,
                temporal_patch_size=2, window_size=16, fullatt_block_indexes=[1], out_hidden_size=48,
            ),
            text_config=dict(
                **LLM, bos_token_id=1, eos_token_id=2,
                rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            ),
            image_token_id=IMAGE_TOKEN, video_token_id=VIDEO_TOKEN, vision_start_token_id=97, vision_end_token_id=96,
            **settings,
        )  # fmt: skip

    @classmethod
    def processor(cls):
        limits = {"shortest_edge": 16 * 16, "longest_edge": SIDE * SIDE}
        images = Qwen2VLImageProcessorPil(size=limits, patch_size=4, merge_size=2, temporal_patch_size=2)
        return cls.processor_class(images, tiny_tokenizer())

    def pixels(self, images):
        """Patches of 4 x 4 pixels, twice for a temporal patch; 2 x 2 of them make a token."""
        grids = [self.grid(image) for image in images]
        patches = [noise(n, 4 * rows * cols, 3 * 2 * 4 * 4) for n, (rows, cols) in zip(images, grids, strict=True)]
        thw = torch.tensor([[1, 2 * rows, 2 * cols] for rows, cols in grids])
        return {"pixel_values": torch.cat(patches), "image_grid_thw": thw}

    def videos(self, videos):
        grids = [self.clip(video) for video in videos]
        patches = [noise(50 + n, 4 * t * h * w, 3 * 2 * 4 * 4) for n, (t, h, w) in zip(videos, grids, strict=True)]
        thw = torch.tensor([[frames, 2 * rows, 2 * cols] for frames, rows, cols in grids])
        return {"pixel_values_videos": torch.cat(patches), "video_grid_thw": thw} | self.seconds(videos)

    def seconds(self, videos):
        """The seconds between the frames of each video."""
        return {"second_per_grid_ts": torch.tensor([1.5 - n % 2 for n in videos])}

    def token_types(self, ids, prompt_length):
        return {"mm_token_type_ids": (ids == IMAGE_TOKEN).int() + 2 * (ids == VIDEO_TOKEN).int()}

    def encoded(self, inputs):
        return self.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"]).pooler_output[None]


def window_order(rows, cols):
    """Return raster numbers of merged tokens, window by window of 2 x 2, as the encoder runs over them."""
    windows = [(r, c) for r in range(0, rows, 2) for c in range(0, cols, 2)]
    return [
        r * cols + c for top, left in windows for r in range(rows)[top : top + 2] for c in range(cols)[left : left + 2]
    ]
