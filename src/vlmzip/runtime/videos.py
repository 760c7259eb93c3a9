"""Read frames of videos with PyAV, and refuse anything else with a one-line message.

A video is a file with one of the endings in `VIDEO_FILES`. An animated image is an image.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from vlmzip.errors import UserError, how_to_install, reason
from vlmzip.models import FAMILIES
from vlmzip.processor import Processor
from vlmzip.runtime.images import ImageError, check_file, shortened, squeeze

#: Endings of video files, in lower case.
VIDEO_FILES = (
    ".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ogv", ".wmv", ".flv", ".3gp",
)  # fmt: skip
#: The number of frames for models whose processor names neither a number nor a rate, as Video-LLaVA's.
USUAL_FRAMES = 8
#: The most memory that the frames of one video may take: 768 frames of 1920x1080 fit, the most that Qwen2.5-VL takes.
MOST_BYTES = 6 * 2**30
#: The memory that Pillow takes for a pixel in RGB.
BYTES_PER_PIXEL = 4

#: Return the 0-based numbers of the frames to read, in ascending order. The arguments are the number of frames of the
#: video and its frames per second.
Choose = Callable[[int, float | None], Sequence[int]]


@dataclass(frozen=True)
class Clip:
    """Some frames of a video."""

    path: str
    frames: list[Image.Image]
    """The frames, as upright RGB, all of one size."""
    numbers: list[int]
    """The 0-based number of each frame in the video."""
    total: int
    """The number of frames of the video."""
    fps: float | None
    """Frames per second of the video; `None` if the file does not say it."""

    @property
    def seconds(self) -> list[float] | None:
        """Return the time of each frame; `None` if it is unknown."""
        return [number / self.fps for number in self.numbers] if self.fps else None

    @property
    def metadata(self) -> dict[str, object]:
        """Return what processors of transformers take as `video_metadata`."""
        return {
            "total_num_frames": self.total,
            "fps": self.fps,
            "duration": self.total / self.fps if self.fps else None,
            "frames_indices": list(self.numbers),
        }

    def as_array(self) -> np.ndarray:
        """Return the pixels, [frames, height, width, 3], from 0 to 255."""
        return np.stack([np.asarray(frame) for frame in self.frames])


def is_video(path: str | os.PathLike[str]) -> bool:
    """Return True if the name of a file ends as those of videos do."""
    return os.fspath(path).lower().endswith(VIDEO_FILES)


def evenly_spaced(total: int, count: int) -> list[int]:
    """Return the numbers of `count` of `total` frames at even distances, from the first to the last.

    A single frame is the middle one. Return all if there are fewer.
    """
    if count == 1:
        return [(total - 1) // 2]
    return np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist()


def expected_frames(video_processor: object, total: int, fps: float | None) -> int:
    """Return the number of frames that a model's processor expects of a video of `total` frames.

    The processor has a number of frames (`num_frames`), or a rate (`fps`) within `min_frames` and `max_frames`. With
    both, the smaller number counts. Without them it is `USUAL_FRAMES`. It is rounded down to whole temporal patches.
    """
    settings = {
        name: getattr(video_processor, name, None) for name in ("num_frames", "fps", "min_frames", "max_frames")
    }
    count = settings["num_frames"] or USUAL_FRAMES
    if settings["fps"] and fps:
        by_rate = max(int(total / fps * settings["fps"]), settings["min_frames"] or 1)
        count = min(by_rate, settings["num_frames"] or by_rate)
    count = min(count, settings["max_frames"] or count, total)
    patch = getattr(video_processor, "temporal_patch_size", None) or 1
    return count - count % patch if count > patch else count


def check_video(path: str | os.PathLike[str]) -> None:
    """Raise `UserError` if a file is not a video, without decoding it."""
    with _opened(path):
        pass


def read_clip(path: str | os.PathLike[str], choose: Choose, most_bytes: int | None = None) -> Clip:
    """Return the frames of a video that `choose` returns the numbers of. Raise `UserError` if it cannot be read.

    A broken video is read up to where it breaks. If the size of frames changes in it, all get that of the first. Only
    the chosen frames are kept in memory. Raise `UserError`, too, if they take more than `most_bytes`, by default
    `MOST_BYTES`.
    """
    with _opened(path) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        fps = float(rate) if rate else None
        total = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    while total:
        numbers = list(choose(total, fps))
        frames, decoded = _frames_at(path, numbers, most_bytes)
        if all(number in frames for number in numbers):
            return Clip(os.fspath(path), [frames[number] for number in numbers], numbers, total, fps)
        total = min(decoded, total - 1)  # the file has fewer frames than it says
    raise UserError(f"{_name(path)} has no frame that can be decoded")


def check_memory(name: str, frames: int, size: tuple[int, int], most_bytes: int | None = None) -> None:
    """Raise `UserError` if frames of this width and height take more than `most_bytes`, by default `MOST_BYTES`."""
    width, height = size
    of_frame = BYTES_PER_PIXEL * width * height
    limit = MOST_BYTES if most_bytes is None else most_bytes
    if frames * of_frame > limit:
        raise ImageError(
            f"{frames:,} frames of {name}, {width}x{height} pixels each, take {frames * of_frame / 2**30:,.1f} GiB of"
            f" memory, and the limit is {limit / 2**30:.3g} GiB: take {limit // of_frame:,} frames or fewer",
            "takes too much memory: take fewer frames",
        )


def video_processor_of(processor: Processor, name: str) -> Any:
    """Return the part of a model's processor that takes videos. Raise `UserError` if the model, `name`, takes none."""
    part = getattr(processor, "video_processor", None)
    if part is None:
        able = ", ".join(family.example for family in FAMILIES if family.video_inputs)
        raise UserError(f"{name} takes no video; models that take videos are {able}")
    return part


def read_clip_for(video_processor: object, path: str | os.PathLike[str], frames: int | None = None) -> Clip:
    """Return `frames` evenly spaced frames of a video; by default as many as the model's processor expects."""
    return read_clip(
        path, lambda total, fps: evenly_spaced(total, frames or expected_frames(video_processor, total, fps))
    )


def clip_arguments(clips: Sequence[Clip]) -> dict[str, object]:
    """Return the arguments with which a processor of transformers takes these frames as they are."""
    return {
        "videos": [clip.as_array() for clip in clips],
        "video_metadata": [clip.metadata for clip in clips],
        "do_sample_frames": False,
    }


def _frames_at(
    path: str | os.PathLike[str], numbers: Sequence[int], most_bytes: int | None
) -> tuple[dict[int, Image.Image], int]:
    """Return the frames with these numbers, as far as the video has them, and the count of decoded frames.

    The decoder stops after the last of them.
    """
    wanted, decoded = set(numbers), 0
    frames: dict[int, Image.Image] = {}
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        # The size of a broken file may be unknown before a frame is decoded.
        announced = getattr(stream, "width", 0), getattr(stream, "height", 0)
        check_memory(_name(path), len(numbers), announced, most_bytes)
        for decoded, frame in enumerate(_decoded(container, stream), start=1):
            if decoded - 1 in wanted:
                image = squeeze(_upright(frame))
                if not frames:
                    size = image.size
                    check_memory(_name(path), len(numbers), size, most_bytes)
                frames[decoded - 1] = image if image.size == size else image.resize(size)
            if len(frames) == len(wanted):
                break
    return frames, decoded


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Yield the frames of a stream until it ends or breaks."""
    av = _import_av()
    try:
        yield from container.decode(stream)
    except av.error.FFmpegError:
        return


def _upright(frame: Any) -> Image.Image:
    """Return a frame as an image, turned and mirrored as players do it."""
    image: Image.Image = frame.to_image()
    rotation = frame.rotation
    for side_data in frame.side_data:
        if side_data.type.name == "DISPLAYMATRIX":
            (a, b, _), (c, d, _), _ = np.frombuffer(side_data, np.int32).reshape(3, 3).tolist()
            if a * d < b * c:  # mirroring, then half a turn less
                image, rotation = ImageOps.mirror(image), rotation + 180
    return image.rotate(rotation, expand=True) if rotation % 360 else image


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[tuple[Any, Any]]:
    """Open a video, and return its container and its first video stream."""
    av, name = _import_av(), _name(path)
    check_file(Path(path), name)
    try:
        container = av.open(os.fspath(path), metadata_errors="replace")  # titles may be in any encoding
    except av.error.FFmpegError as error:
        cause = "" if isinstance(error, av.error.InvalidDataError) else f": {error.strerror}"
        raise UserError(f"{name} is not a video that PyAV can read{cause}") from None
    with container:
        if not container.streams.video:
            raise UserError(f"{name} has no images, only sound or text; give a video")
        yield container, container.streams.video[0]


def _name(path: str | os.PathLike[str]) -> str:
    return repr(shortened(os.fspath(path)))


def _import_av() -> Any:
    try:
        import av  # an optional package, which takes a while to import
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        cause = "" if missing else f" ({reason(error)})"
        raise UserError(f"reading videos needs PyAV{cause}: {how_to_install('video')}") from None
    return av
