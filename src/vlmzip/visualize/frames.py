"""A contact sheet of the frames of a video, each with what became of its tokens, its number and its time."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from vlmzip.runtime.report import ImageReport
from vlmzip.runtime.videos import Clip
from vlmzip.visualize.overlay import counts_of
from vlmzip.visualize.sheet import Panel, contact_sheet, fates_panel


def draw_frames(title: str, seen: Sequence[Image.Image], reports: Sequence[ImageReport], clip: Clip) -> Image.Image:
    """Draw each frame of tokens on its image in `seen`, in order of time.

    `reports` has the report on the video, or one on each frame for models that take frames as images.
    """
    frames = [frame for report in reports for frame in report.frames]
    panels = []
    for image, frame, label in zip(seen, frames, frame_labels(clip, len(frames)), strict=True):
        assert frame.token_map is not None  # methods without a map are refused earlier, see `check_method`
        drawn = fates_panel(image, frame.token_map, frame.grid, frame.prefix)
        panels.append(Panel(drawn, label, counts_of(frame.token_map, frame.prefix)))
    return contact_sheet(title, panels)


def first_frames(clip: Clip, count: int) -> list[Image.Image]:
    """Return the first image of each of the `count` frames of tokens. Some models join several images into one."""
    return clip.frames[:: _joined(clip, count)]


def frame_labels(clip: Clip, count: int) -> list[str]:
    """Return the number and time of each of the `count` frames of tokens, such as "frames 6 and 12, 0.60 s"."""
    joined, labels = _joined(clip, count), []
    for first in range(0, len(clip.frames), joined):
        numbers = clip.numbers[first : first + joined]
        label = f"frame{'s' * (len(numbers) > 1)} {' and '.join(map(str, numbers))}"
        labels.append(label + (f", {clip.seconds[first]:.2f} s" if clip.seconds else ""))
    return labels


def _joined(clip: Clip, count: int) -> int:
    """Return how many images make one frame of tokens."""
    return -(-len(clip.frames) // count)
