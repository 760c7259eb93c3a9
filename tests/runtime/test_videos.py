"""Frames of videos: which are read, and what is refused."""

import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmzip import UserError
from vlmzip.errors import how_to_install
from vlmzip.runtime.videos import Clip, check_memory, check_video, evenly_spaced, expected_frames, is_video, read_clip

av = pytest.importorskip("av")
from tests.clips import write_clip  # noqa: E402


def five(total, fps):
    return evenly_spaced(total, 5)


def brightness(clip):
    return [float(np.asarray(frame).mean()) for frame in clip.frames]


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_frames_are_evenly_spaced(tmp_path, suffix):
    clip = read_clip(write_clip(tmp_path / f"clip.{suffix}", 21), five)
    assert (clip.numbers, clip.total, clip.fps) == ([0, 5, 10, 15, 20], 21, 10)
    assert clip.seconds == [0, 0.5, 1, 1.5, 2]
    assert brightness(clip) == pytest.approx([0, 60, 120, 180, 240], abs=6)
    assert clip.as_array().shape == (5, 48, 64, 3)
    assert clip.metadata == {"total_num_frames": 21, "fps": 10, "duration": 2.1, "frames_indices": clip.numbers}


def test_a_short_clip_gives_all_its_frames(tmp_path):
    assert read_clip(write_clip(tmp_path / "clip.mp4", 3), five).numbers == [0, 1, 2]


def test_a_clip_with_fewer_frames_than_it_says_is_read_up_to_its_end(tmp_path):
    whole = write_clip(tmp_path / "clip.mkv", 21, size=(320, 240))
    content = (tmp_path / "clip.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(content[: len(content) * 2 // 3])
    clip = read_clip(tmp_path / "cut.mkv", five)
    assert 5 < clip.total < read_clip(whole, five).total
    assert clip.numbers == evenly_spaced(clip.total, 5)
    assert brightness(clip) == pytest.approx([12 * number for number in clip.numbers], abs=6)


def test_frames_that_a_header_counts_and_the_file_lacks(tmp_path, monkeypatch):
    import vlmzip.runtime.videos as videos

    path = write_clip(tmp_path / "clip.mp4", 21)
    decoded = videos._decoded
    monkeypatch.setattr(videos, "_decoded", lambda *opened: [*decoded(*opened)][:9])
    clip = read_clip(path, five)
    assert (clip.total, clip.numbers) == (9, [0, 2, 4, 6, 8])
    monkeypatch.setattr(videos, "_decoded", lambda *opened: [])
    with pytest.raises(UserError, match=r"clip.mp4' has no frame that can be decoded"):
        read_clip(path, five)


def test_a_frame_may_be_taken_twice(tmp_path):
    clip = read_clip(write_clip(tmp_path / "clip.mp4", 2), lambda total, fps: [0, 0, 1, 1])
    assert clip.numbers == [0, 0, 1, 1]
    assert brightness(clip) == pytest.approx([0, 0, 12, 12], abs=6)


@pytest.mark.parametrize(("asked", "limit"), [(10**9, 20), (3, 2)])
def test_frames_that_take_too_much_memory_are_refused_before_they_are_decoded(tmp_path, monkeypatch, asked, limit):
    import vlmzip.runtime.videos as videos

    path, decoded = write_clip(tmp_path / "clip.mp4", 21), []
    decode = videos._decoded
    monkeypatch.setattr(videos, "_decoded", lambda *opened: (decoded.append(0) or frame for frame in decode(*opened)))
    monkeypatch.setattr(videos, "MOST_BYTES", limit * 4 * 64 * 48)
    count = min(asked, 21)
    with pytest.raises(UserError, match=rf"{count} frames of .*clip.mp4', 64x48 pixels each, take .*: take {limit} fr"):
        videos.read_clip_for(object(), path, asked)
    assert not decoded
    assert len(videos.read_clip_for(object(), path, limit).frames) == limit


def test_the_limit_is_in_words():
    message = (
        "1,000,000,000 frames of a video, 336x336 pixels each, take 420,570.4 GiB of memory, and the limit is 6 GiB:"
        " take 14,266 frames or fewer"
    )
    with pytest.raises(UserError, match=f"^{message}$"):
        check_memory("a video", 10**9, (336, 336))


def test_one_frame_is_the_middle_one():
    assert [evenly_spaced(total, 1) for total in (1, 4, 9)] == [[0], [1], [4]]
    assert evenly_spaced(10, 4) == [0, 3, 6, 9]


def write_images(path, image, title=""):
    with av.open(str(path), "w") as out:
        out.metadata["title"] = title
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = *image.size, "yuv420p"
        for _ in range(2):
            out.mux(stream.encode(av.VideoFrame.from_image(image)))
        out.mux(stream.encode())


@pytest.mark.parametrize(
    ("across", "down"),
    [
        *(((1, 0), (0, 1)), ((0, 1), (-1, 0)), ((-1, 0), (0, -1)), ((0, -1), (1, 0))),  # turned, as phones film
        *(((-1, 0), (0, 1)), ((1, 0), (0, -1)), ((0, 1), (1, 0)), ((0, -1), (-1, 0))),  # and mirrored
    ],
)
def test_frames_are_shown_as_the_file_says(tmp_path, across, down):
    """A step to the right, or down, in a frame of the file is the step `across`, or `down`, in what players show."""
    quarters = np.array([[0, 80], [160, 240]], np.uint8)
    write_images(tmp_path / "clip.mp4", Image.fromarray(quarters).resize((64, 48), Image.Resampling.NEAREST))
    content = (tmp_path / "clip.mp4").read_bytes()
    unit, last = 1 << 16, 1 << 30
    before, after = (
        struct.pack(">9i", a * unit, b * unit, 0, c * unit, d * unit, 0, 0, 0, last)
        for (a, b), (c, d) in (((1, 0), (0, 1)), (across, down))
    )
    track = content.index(b"tkhd")
    (tmp_path / "clip.mp4").write_bytes(content[:track] + content[track:].replace(before, after, 1))
    shown = np.zeros((2, 2))
    for row, col in np.ndindex(2, 2):
        x, y = ((2 * col - 1) * a + (2 * row - 1) * b for a, b in zip(across, down, strict=True))
        shown[(y + 1) // 2, (x + 1) // 2] = quarters[row, col]
    frame = read_clip(tmp_path / "clip.mp4", five).frames[0]
    assert frame.size == ((64, 48) if across[0] else (48, 64))
    pixels = np.asarray(frame.convert("L"))
    height, width = pixels.shape
    seen = [[pixels[row * height // 4, col * width // 4] for col in (1, 3)] for row in (1, 3)]
    assert np.abs(np.array(seen, float) - shown).max() < 12


def test_titles_may_be_in_any_encoding(tmp_path):
    write_images(tmp_path / "clip.avi", Image.new("RGB", (64, 48)), title="CafXYZ")
    content = (tmp_path / "clip.avi").read_bytes()
    assert b"CafXYZ" in content
    (tmp_path / "clip.avi").write_bytes(content.replace(b"CafXYZ", "Café ".encode("latin-1") + b"\xff"))
    assert read_clip(tmp_path / "clip.avi", five).numbers == [0, 1]


def test_all_frames_get_the_size_of_the_first(tmp_path):
    for name, size in (("a", (64, 48)), ("b", (96, 48))):
        write_clip(tmp_path / f"{name}.mpg", 6, size=size, fps=25, codec="mpeg2video")
    (tmp_path / "both.mpg").write_bytes(b"".join((tmp_path / f"{name}.mpg").read_bytes() for name in "ab"))
    clip = read_clip(tmp_path / "both.mpg", five)
    assert clip.total > 6
    assert clip.as_array().shape == (5, 48, 64, 3)


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv", "mpg"])
def test_broken_files_are_read_or_refused(tmp_path, suffix):
    """Copies that end early, lack a part, or have other bytes in twenty places."""
    codec, fps = ("mpeg2video", 25) if suffix == "mpg" else ("mpeg4", 10)
    content = Path(write_clip(tmp_path / f"clip.{suffix}", 12, noise=40, codec=codec, fps=fps)).read_bytes()
    rng, broken, messages = np.random.default_rng(0), tmp_path / f"broken.{suffix}", []
    for number in range(60):
        place, length = rng.integers(len(content)), rng.integers(1, 400)
        changed = np.frombuffer(content, np.uint8).copy()
        changed[rng.integers(len(content), size=20)] = rng.integers(256, size=20)
        versions = (content[:place], content[:place] + content[place + length :], changed.tobytes())
        broken.write_bytes(versions[number % 3])
        try:
            clip = read_clip(broken, five)
            assert len(clip.as_array()) == len(clip.numbers)
        except UserError as error:
            messages.append(str(error))
    assert 0 < len(messages) < 60
    assert not any("\n" in message for message in messages)


class Settings:
    def __init__(self, **settings):
        vars(self).update(settings)


@pytest.mark.parametrize(
    ("settings", "total", "fps", "expected"),
    [
        ({}, 100, 10, 8),
        ({}, 5, 10, 5),
        ({"num_frames": 32}, 100, 10, 32),
        ({"num_frames": 32}, 20, 10, 20),
        ({"fps": 2}, 100, 10, 20),
        ({"fps": 2, "min_frames": 4}, 10, 10, 4),
        ({"fps": 2, "max_frames": 12}, 100, 10, 12),
        ({"fps": 2}, 100, None, 8),
        ({"fps": 1, "num_frames": 64}, 100, 10, 10),  # SmolVLM
        ({"fps": 1, "num_frames": 64}, 1000, 10, 64),
        ({"fps": 2, "temporal_patch_size": 2}, 105, 10, 20),
        ({"temporal_patch_size": 2}, 1, 10, 1),
    ],
)
def test_the_processor_says_how_many_frames(settings, total, fps, expected):
    assert expected_frames(Settings(**settings), total, fps) == expected


def test_files_that_are_no_videos(tmp_path):
    (tmp_path / "text.mp4").write_text("text")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    with av.open(str(tmp_path / "sound.mkv"), "w") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    for name, message in (
        ("missing.mp4", "there is no file"),
        ("text.mp4", "is not a video that PyAV can read"),
        ("empty.mp4", "is empty"),
        ("folder.mp4", "is a folder"),
        ("sound.mkv", "has no images, only sound or text; give a video"),
    ):
        for read in (check_video, lambda path: read_clip(path, five)):
            with pytest.raises(UserError, match=message) as error:
                read(tmp_path / name)
            assert "\n" not in str(error.value)


def test_videos_are_known_by_their_names():
    assert [is_video(name) for name in ("a.mp4", "A.MOV", "a.webm", "a.gif", "a.png", "mp4", "frames")] == [
        *[True] * 3,
        *[False] * 4,
    ]


def test_without_pyav_the_message_says_how_to_install_it(tmp_path, monkeypatch):
    path = write_clip(tmp_path / "clip.mp4", 2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=re.escape(f"reading videos needs PyAV: {how_to_install('video')}") + "$"):
        check_video(path)


def test_without_a_rate_the_times_are_unknown():
    clip = Clip("a.mp4", [Image.new("RGB", (4, 4))], [0], 1, None)
    assert clip.seconds is None
    assert clip.metadata["duration"] is None
