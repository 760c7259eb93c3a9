"""Contact sheets of videos: each panel has the tokens, the numbers and the time of its frame."""

import pytest
import torch
from PIL import Image

from vlmzip import Grid, TokenMap
from vlmzip.models.layout import Layout
from vlmzip.runtime.report import ImageReport
from vlmzip.runtime.videos import Clip
from vlmzip.visualize.frames import draw_frames, first_frames, frame_labels
from vlmzip.visualize.sheet import LINE, MARGIN, SIDE

COLOURS = [(200, 100, 50), (50, 200, 100), (100, 50, 200)]


def clip(frames, fps=10.0):
    images = [Image.new("RGB", (16, 16), COLOURS[n % 3]) for n in range(frames)]
    return Clip("a.mp4", images, [3 * n for n in range(frames)], 3 * frames, fps)


def report(layout, kept, modality="video"):
    token_map = TokenMap.keep(torch.tensor([kept]))
    return ImageReport(0, len(kept), sum(kept), (sum(kept),), token_map, layout, None, modality)


@pytest.mark.parametrize(
    ("frames", "count", "expected"),
    [
        (3, 3, ["frame 0, 0.00 s", "frame 3, 0.30 s", "frame 6, 0.60 s"]),
        (4, 2, ["frames 0 and 3, 0.00 s", "frames 6 and 9, 0.60 s"]),
        (3, 2, ["frames 0 and 3, 0.00 s", "frame 6, 0.60 s"]),  # the processor repeats the last frame
    ],
)
def test_labels_have_the_numbers_of_the_frames_and_the_time_of_the_first(frames, count, expected):
    assert frame_labels(clip(frames), count) == expected
    assert [image.getpixel((0, 0)) for image in first_frames(clip(frames), count)] == [
        COLOURS[n % 3] for n in range(0, frames, frames // count + (frames % count > 0))
    ]


def test_without_a_rate_labels_have_no_time():
    assert frame_labels(clip(2, None), 2) == ["frame 0", "frame 3"]


@pytest.mark.parametrize("as_clip", [False, True])
def test_frames_of_a_view_of_all_frames_are_those_of_views(as_clip):
    """With one CLS before each frame of 2 x 2 tokens. As one view, all CLS come first."""
    layout = Layout.of_frames(Grid(1, 2, 2), 3, prefix=1, passes_prefix=True)
    by_frame = torch.arange(15).view(3, 5)
    order = torch.cat([by_frame[:, 0], by_frame[:, 1:].flatten()]) if as_clip else by_frame.flatten()
    kept = (order % 4 == 0).tolist()
    frames = report(layout.as_clip if as_clip else layout, kept).frames
    assert [(frame.grid, frame.prefix) for frame in frames] == [(Grid(1, 2, 2), 1)] * 3
    assert [(frame.token_map.group[0] >= 0).tolist() for frame in frames] == (by_frame % 4 == 0).tolist()


@pytest.mark.parametrize("as_images", [False, True])
def test_each_panel_shows_the_tokens_of_its_frame(as_images):
    """Of a video, or of the images into which some models turn it. Frame n keeps token n of 2 x 2."""
    kept = [[token == frame for token in range(4)] for frame in range(3)]
    if as_images:
        reports = [report(Layout.of_one_view(Grid(1, 2, 2)), of_frame, "image") for of_frame in kept]
    else:
        reports = [report(Layout.of_frames(Grid(1, 2, 2), 3), [token for of_frame in kept for token in of_frame])]
    page = draw_frames("title", clip(3).frames, reports, clip(3))
    assert page.width == 3 * (SIDE + MARGIN) + MARGIN
    top = MARGIN + LINE + MARGIN // 2
    for frame, colour in enumerate(COLOURS):
        for token in range(4):
            left = MARGIN + frame * (SIDE + MARGIN)
            pixel = page.getpixel((left + SIDE // 4 + token % 2 * SIDE // 2, top + SIDE // 4 + token // 2 * SIDE // 2))
            assert pixel == colour if token == frame else max(pixel) < 80
