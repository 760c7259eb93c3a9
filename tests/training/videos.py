"""Processors of tiny models for images and videos. transformers' own parts for videos need torchvision."""

import torch
from PIL import Image
from transformers.video_utils import VideoMetadata

from tests.families import FAMILIES
from tests.tiny import VIDEO_TOKEN

#: A template without end of text that writes images and videos where they stand.
TEMPLATE = (
    "{% for m in messages %}{{ 'w4 ' if m.role == 'user' else 'w5 ' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }} {% else %}{{ '<' + part.type + '> ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}w5 {% endif %}"
)


class FramesAsImages:
    """A processor of videos that prepares frames with the processor of images."""

    temporal_patch_size = 2

    def __init__(self, images):
        self.images, self.merge_size = images, getattr(images, "merge_size", None)

    def __call__(self, videos, *, do_sample_frames, video_metadata, **_):
        assert do_sample_frames is False
        (video,) = videos
        frames = [Image.fromarray(frame) for frame in video]
        if self.merge_size is None:
            return {"pixel_values_videos": self.images(images=frames, return_tensors="pt")["pixel_values"][None]}
        # Every second frame stands for two, which share patches.
        patches = self.images(images=frames[::2], return_tensors="pt")
        _, rows, cols = patches["image_grid_thw"][0].tolist()
        return {
            "pixel_values_videos": patches["pixel_values"],
            "video_grid_thw": torch.tensor([[len(frames[::2]), rows, cols]]),
            "video_metadata": [VideoMetadata(**of_video) for of_video in video_metadata],
        }


def processor_with_videos(name):
    """Return the processor of a tiny family with a chat template and, if the family knows videos, a part for them."""
    processor = FAMILIES[name].processor()
    processor.chat_template = TEMPLATE
    if FAMILIES[name].clips:
        one_tile = FAMILIES["llava"].processor().image_processor
        has_tiles = hasattr(processor.image_processor, "image_grid_pinpoints")
        processor.video_processor = FramesAsImages(one_tile if has_tiles else processor.image_processor)
        processor.tokenizer.add_tokens(["<video>"], special_tokens=True)
        processor.video_token, processor.video_token_id = "<video>", VIDEO_TOKEN
        processor.vision_start_token, processor.vision_end_token = "w97", "w96"
    return processor
