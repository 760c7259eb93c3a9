"""Clips of few small frames, and processors for videos that need no torchvision."""

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata

from vlmzip.models.towers.qwen import patches_of
from vlmzip.visual_tokens import Grid


def write_clip(path, frames=20, size=(64, 48), fps=10, codec="mpeg4", step=12):
    """Write a video whose frame n is grey of brightness n * step; return its path as text."""
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            grey = Image.new("RGB", size, (number * step % 256,) * 3)
            out.mux(stream.encode(av.VideoFrame.from_image(grey)))
        out.mux(stream.encode())
    return str(path)


class VideoProcessor:
    """What all processors of videos have."""

    image_mean, image_std = [0.5] * 3, [0.5] * 3

    def to_dict(self):
        return vars(self)


class PatchesOfVideos(VideoProcessor):
    """Cuts videos into patches as Qwen's processors do; all frames become 16 x 24 pixels, 2 x 3 tokens."""

    merge_size, temporal_patch_size, model_input_names = 2, 2, ["pixel_values_videos", "video_grid_thw"]

    def __init__(self, vision_config, **settings):
        self.vision_config = vision_config
        vars(self).update(settings)

    def __call__(self, videos, *, video_metadata, do_sample_frames, **_):
        assert not do_sample_frames
        patches, grids = [], []
        for video in videos:
            frames = [torch.tensor(np.asarray(Image.fromarray(frame).resize((24, 16)))) / 255 for frame in video]
            frames += frames[-1:] * (len(frames) % 2)
            grid = Grid(len(frames) // 2, 2, 3)
            patches.append(patches_of(torch.stack(frames).permute(0, 3, 1, 2), grid, self.vision_config))
            grids.append([grid.frames, 4, 6])
        return BatchFeature(
            {
                "pixel_values_videos": torch.cat(patches),
                "video_grid_thw": torch.tensor(grids),
                "video_metadata": [VideoMetadata(**metadata) for metadata in video_metadata],
            }
        )


class FramesOfVideos(VideoProcessor):
    """Resizes and normalises the frames of videos as a processor of images does."""

    model_input_names = ("pixel_values_videos",)

    def __init__(self, images, name="pixel_values_videos", **settings):
        self.images, self.name = images, name
        self.image_mean, self.image_std = images.image_mean, images.image_std
        vars(self).update(settings)

    def __call__(self, videos, *, video_metadata, do_sample_frames, **_):
        assert not do_sample_frames
        pixels = [self.images([Image.fromarray(frame) for frame in video], return_tensors="pt") for video in videos]
        return BatchFeature(
            {
                self.name: torch.stack([of_video["pixel_values"] for of_video in pixels]),
                "video_metadata": [VideoMetadata(**metadata) for metadata in video_metadata],
            }
        )
