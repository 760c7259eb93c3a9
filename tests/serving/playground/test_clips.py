"""Questions about a clip, on a tiny model that takes them."""

import base64
import tempfile
from pathlib import Path

import pytest

from tests.clips import write_clip
from tests.serving.server.running import engine_of
from vlmzip.serving.playground.play import Budget, Playground
from vlmzip.serving.server.settings import Settings


def clip_url(content):
    return f"data:video/mp4;base64,{base64.b64encode(content).decode()}"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return Path(write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 12)).read_bytes()


@pytest.fixture(scope="module")
def clips(qwen):
    engine = engine_of(qwen, Settings())
    engine.start(lambda: None)
    yield Playground(engine, Settings())
    engine.stop()


def cards_of(playground, url, names, question="cat ?"):
    return list(playground.run(url, question, Budget(24, remaining=True), names))[-1].cards


def test_each_frame_is_drawn_and_methods_for_videos_keep_the_budget(clips, content):
    plain, *cards = cards_of(clips, clip_url(content), ["visionzip", "evs"])
    assert plain.answer.before == clips.count(clip_url(content)) == 16 * len(plain.answer.images)
    assert len(plain.answer.images) > 1
    for card in cards:
        assert card.error == ""
        assert card.answer.by_layer[-1] == 24
        assert len(card.answer.images) == len(plain.answer.images)


def test_methods_for_videos_are_refused_for_images(clips, image):
    _, card = cards_of(clips, image, ["evs"])
    assert "drops tokens of videos only" in card.error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "the file is not a video in MP4"),
        (b"ffconcat version 1.0\nfile /etc/passwd\n", "the file is not a video in MP4"),
        (b"", "the file is not a video in MP4"),
        (b"\0\0\0\x18ftypmp42" + b"\0" * 200, "the clip is not a video that PyAV can read"),
    ],
)
def test_other_files_are_refused(clips, content, message):
    (card,) = cards_of(clips, clip_url(content), [])
    assert card.error.startswith(message)


def test_a_placeholder_in_the_question_is_refused(clips, content):
    (card,) = cards_of(clips, clip_url(content), [], "<video> ?")
    assert "placeholder" in card.error


def test_frames_have_the_limit_of_pixels_of_the_server(qwen, content):
    engine = engine_of(qwen, Settings())
    few = Playground(engine, Settings(max_pixels=5 * 64 * 48))
    asked = few.reader.read(clip_url(content), "cat ?")
    assert len(asked.visual.frames) == 5
    with pytest.raises(ValueError, match="memory"):
        Playground(engine, Settings(max_pixels=64 * 48 - 1)).reader.read(clip_url(content), "cat ?")


def test_no_file_stays(clips, content, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cards_of(clips, clip_url(content), [])
    assert list(tmp_path.iterdir()) == []
