"""Clips of few small frames, and processors for videos that need no torchvision."""

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, CLIPImageProcessor
from transformers.video_utils import VideoMetadata

from vlmzip.models.towers.qwen import patches_of
from vlmzip.visual_tokens import Grid


def with_videos(family, grid=(2, 3), **settings):
    """Return the processor of a tiny family, which takes videos without torchvision; `grid` is of Qwen's frames."""
    from tests.tiny import SIDE, VIDEO_TOKEN  # it needs pytest, and `make test-extras` writes clips without

    processor = family.processor()
    if "qwen" in family.name:
        videos = PatchesOfVideos(family.model.config.vision_config, grid, **settings)
    else:
        images = CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)
        videos = FramesOfVideos(images, **settings)
    processor.video_processor, processor.video_token, processor.video_token_id = videos, "<video>", VIDEO_TOKEN
    processor.tokenizer.add_tokens(["<video>"], special_tokens=True)  # not three words
    return processor


def write_clip(path, frames=20, size=(64, 48), fps=10, codec="mpeg4", step=12, noise=0):
    """Write a video whose frame n is grey of brightness n * step, with some noise; return its path as text."""
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_image(grey(number * step % 256, size, noise))))
        out.mux(stream.encode())
    return str(path)


def grey(brightness, size, noise=0):
    """Return a grey image; the brightness of each eighth of its sides differs by up to `noise`."""
    values = brightness + np.random.default_rng(brightness).integers(-noise, noise + 1, (8, 8))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)).resize(size).convert("RGB")


class VideoProcessor:
    """What all processors of videos have."""

    image_mean, image_std = [0.5] * 3, [0.5] * 3

    def to_dict(self):
        return vars(self)


class PatchesOfVideos(VideoProcessor):
    """Cuts videos into patches as Qwen's processors do; tokens are 8 x 8 pixels, `grid` of them in each frame."""

    merge_size, temporal_patch_size, model_input_names = 2, 2, ["pixel_values_videos", "video_grid_thw"]

    def __init__(self, vision_config, grid, **settings):
        self.vision_config, (self.rows, self.cols) = vision_config, grid
        vars(self).update(settings)

    def __call__(self, videos, *, video_metadata, do_sample_frames, **_):
        assert not do_sample_frames
        patches, grids = [], []
        for video in videos:
            resized = [Image.fromarray(frame).resize((8 * self.cols, 8 * self.rows)) for frame in video]
            frames = [torch.tensor(np.asarray(frame)) / 127.5 - 1 for frame in resized]
            frames += frames[-1:] * (len(frames) % 2)
            grid = Grid(len(frames) // 2, self.rows, self.cols)
            patches.append(patches_of(torch.stack(frames).permute(0, 3, 1, 2), grid, self.vision_config))
            grids.append([grid.frames, 2 * grid.rows, 2 * grid.cols])
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
