"""The commands on videos: frames are read, counted and drawn, and mistakes give one line."""

import json
import shlex

import pytest
from PIL import Image
from transformers import AutoProcessor

from tests.clips import with_videos, write_clip
from tests.families import FAMILIES
from vlmzip import UserError
from vlmzip.cli import ask, calibrate, show
from vlmzip.cli.main import main
from vlmzip.errors import how_to_install
from vlmzip.models import family_of
from vlmzip.runtime.loading import Loaded
from vlmzip.runtime.prompt_text import visual_prompt

pytest.importorskip("av")


def loaded(name, **settings):
    family = FAMILIES[name]()
    return Loaded(name, family.model, with_videos(family, **settings), family_of(family.model))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 21)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "red.png"
    Image.new("RGB", (60, 40), "red").save(path)
    return str(path)


@pytest.fixture
def vlmzip(capsys, monkeypatch):
    """Run a command line on a tiny model, and return its exit code, output and errors."""

    def run(line, name="qwen3_vl", **settings):
        for command in (ask, show, calibrate):
            monkeypatch.setattr(command, "load", lambda *_, **__: loaded(name, **settings))
        code = main(shlex.split(line))
        return code, *capsys.readouterr()

    return run


def test_ask_about_a_video(vlmzip, clip):
    code, out, err = vlmzip(f"ask {clip} w9 --frames 6 --keep-per-view 2 --max-new-tokens 2 --json")
    assert code == 0, err
    (video,) = json.loads(out)["images"]
    assert (video["path"], video["before"], video["after"]) == (clip, 18, 6)
    assert video["frames"] == [0, 4, 8, 12, 16, 20]
    assert video["seconds"] == [0, 0.4, 0.8, 1.2, 1.6, 2]


@pytest.mark.parametrize(
    ("settings", "frames"), [({}, 8), ({"num_frames": 4}, 4), ({"fps": 5, "min_frames": 4, "max_frames": 768}, 10)]
)
def test_the_processor_says_how_many_frames_without_the_option(vlmzip, clip, settings, frames):
    code, out, err = vlmzip(f"show {clip} --json --keep 8 --out {clip}.png", **settings)
    assert code == 0, err
    assert len(json.loads(out)["images"][0]["frames"]) == frames


def test_images_and_videos_in_one_prompt_keep_their_order(vlmzip, clip, image, tmp_path):
    line = f"ask {clip} {image} {clip} w9 --frames 2 --method evs --keep 50% --max-new-tokens 2 --json"
    code, out, _ = vlmzip(line)
    assert code == 2  # the tiny model has no chat template
    line = f"ask {image} {clip} {clip} w9 --frames 4 --method evs --keep 50% --max-new-tokens 2 --json"
    code, out, err = vlmzip(f"{line} --overlay {tmp_path / 'tokens.png'}")
    assert code == 0, err
    counts = [(counted["path"], counted["before"], counted["after"]) for counted in json.loads(out)["images"]]
    assert counts == [(image, counts[0][1], counts[0][1]), (clip, 12, 6), (clip, 12, 6)]
    assert Image.open(tmp_path / "tokens.png").height > 1000


@pytest.mark.skipif("video_llava" not in FAMILIES, reason="it is tested from transformers 5.23 on")
def test_frames_of_one_encoder_are_drawn_as_it_sees_them(vlmzip, clip, tmp_path):
    overlay = tmp_path / "tokens.png"
    code, out, err = vlmzip(f"show {clip} --frames 5 --keep-per-view 17 --out {overlay}", "video_llava")
    assert code == 0, err
    assert out.startswith(f"{clip}: 185 → 85 visual tokens in 5 frames\n")
    page = Image.open(overlay).convert("RGB")
    assert page.size[0] == 4 * (312 + 16) + 16
    # The first token of the third frame is kept; frame 10 has brightness 120.
    colours = {colour for _, colour in page.getcolors(page.width * page.height)}
    assert any(max(abs(value - 120) for value in colour) < 8 for colour in colours)


def test_the_upper_count_of_an_image_is_not_that_of_a_video(vlmzip, clip, tmp_path):
    line = f"show {clip} --keep-per-view 2 --out {tmp_path}/tokens.png"
    code, out, err = vlmzip(line, "llava_next_video")
    assert code == 0, err
    assert "upper count" not in out
    assert json.loads(vlmzip(f"{line} --json", "llava_next_video")[1])["upper_count"] is None


@pytest.mark.parametrize("name", ["llava_next_video", "qwen3_vl"])
def test_videos_of_different_lengths(vlmzip, clip, tmp_path, name):
    short = write_clip(tmp_path / "short.mp4", 2)
    code, out, err = vlmzip(f"ask {short} {clip} w9 --max-new-tokens 2", name)
    if name == "qwen3_vl":
        assert code == 0, err
        return
    assert (code, out) == (2, "")
    assert (
        f"{name} takes videos of equally many frames, and these have 2 and 8: ask about one, or give --frames 2" in err
    )
    assert vlmzip(f"ask {short} {clip} w9 --max-new-tokens 2 --frames 2", name)[0] == 0


@pytest.mark.parametrize("method", ["evs --keep 50%", "fastv --layer 2 --keep 50%", "downsample --keep-per-view 4"])
def test_overlays_of_videos(vlmzip, clip, tmp_path, method):
    overlay = tmp_path / "tokens.png"
    code, _, err = vlmzip(f"ask {clip} w9 --frames 6 --max-new-tokens 2 --method {method} --overlay {overlay}")
    assert (code, "Traceback" in err) == (0, False), err
    assert Image.open(overlay).width > 900


def test_mistakes_give_one_line(vlmzip, clip, image, tmp_path):
    (tmp_path / "text.mp4").write_text("text")
    (tmp_path / "frames").mkdir()
    for line, message in (
        (f"ask {tmp_path}/missing.mp4 w9", "there is no file"),
        (f"ask {tmp_path}/text.mp4 w9", "is not a video that PyAV can read"),
        (f"ask {tmp_path}/frames w9", "is a folder"),
        (f"ask {clip} w9 --frames 0", "--frames 0: give at least 1"),
        (f"ask {image} w9 --frames 2", "--frames is the number of frames of a video, and there is only an image"),
        (f"show {image} --frames 2", "--frames is the number of frames of a video, and there is only an image"),
        (f"ask {clip}", "there is a video but no question"),
        (f"ask {image} {clip}", "is a video: add a question after it"),
        (f'ask {clip} "w9 <video>"', "the question must not contain <video>: videos are placed before it"),
        (f"show {clip} --method fastv", "use vlmzip ask … --overlay FILE"),
        (f"compare {clip} w9", "is a video: use vlmzip ask for it"),
    ):
        code, out, err = vlmzip(line)
        assert (code, out) == (2, ""), line
        assert message in err, line
        assert err.count("\n") == 1, line


def test_models_without_videos_name_those_that_take_them(capsys, clip):
    assert main(["ask", clip, "what ?"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("vlmzip: mini takes no video; models that take videos are ")
    assert "Qwen/Qwen2.5-VL-7B-Instruct" in err


def test_a_short_video_has_fewer_frames_than_asked(vlmzip, tmp_path):
    path = write_clip(tmp_path / "short.mp4", 3)
    code, out, err = vlmzip(f"show {path} --frames 8 --keep 4 --json --out {tmp_path / 'tokens.png'}")
    assert (code, json.loads(out)["images"][0]["frames"]) == (0, [0, 1, 2])
    assert f"{path} has only 3 frames" in err


def test_without_torchvision_the_message_says_how_to_install_it(capsys, clip, tmp_path, monkeypatch):
    FAMILIES["qwen2_5_vl"]().model.save_pretrained(tmp_path)

    def refuse(*_, **__):
        raise ImportError("\nQwen2VLVideoProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", refuse)
    assert main(["ask", clip, "what ?", "--model", str(tmp_path)]) == 2
    message = f"takes videos, and its processor needs torchvision: {how_to_install('video')}"
    assert capsys.readouterr().err == f"vlmzip: '{tmp_path}' {message}\n"


def test_without_a_chat_template_videos_stand_after_images():
    family, processor = loaded("qwen3_vl").family, loaded("qwen3_vl").processor
    assert visual_prompt(family, processor, "w9", ["image", "video"]) == "<image><video>w9"
    with pytest.raises(UserError, match="no image after text and none after a video"):
        visual_prompt(family, processor, "w9", ["video", "image"])


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Return a folder of videos whose frames have little or much in them."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(4):
        write_clip(folder / f"{number}.mp4", 12, step=5, noise=20 * number)
    return folder


@pytest.mark.parametrize(("option", "average"), [("--keep 50%", 24), ("--keep 24", 24), ("--keep-per-view 8", 24)])
def test_calibrate_on_videos(vlmzip, clips, option, average):
    line = f"calibrate {clips} {option} --max-factor 2 --frames 6"
    code, out, err = vlmzip(f"{line} --json", grid=(4, 4))
    assert code == 0, err
    result = json.loads(out)
    assert (result["images"], result["kinds"], sum(result["by_factor"].values())) == (4, "video", 4 * 3)
    assert result["average"] == pytest.approx(average, rel=0.05)
    code, out, _ = vlmzip(line, grid=(4, 4))
    assert "24 visual tokens per video on average, 50.0% of all" in out
    assert "frames" in out
    assert "use it: vlmzip ask VIDEO QUESTION --method" in out


def test_calibrate_needs_one_budget_and_images_or_videos(vlmzip, clips, tmp_path):
    for line, message in (
        (f"calibrate {clips} --keep 9 --keep-per-view 3", "give --keep or --keep-per-view, not both"),
        (f"calibrate {clips}", "calibrate needs a budget"),
        (f"calibrate {clips} --keep-per-view 0", "--keep-per-view 0 keeps nothing"),
        (f"calibrate {tmp_path} --keep 9", "there is no image in the folder"),
        (f"calibrate {clips} --keep 9 --frames 0", "--frames 0: give at least 1"),
    ):
        code, out, err = vlmzip(line)
        assert (code, out, message in err) == (2, "", True), err


def test_a_folder_without_common_images_has_none(vlmzip, tmp_path):
    (tmp_path / "a.eps").write_text("%!PS")  # Pillow would start a program to read it
    code, _, err = vlmzip(f"calibrate {tmp_path} --keep 9")
    assert code == 2
    assert "there is no image in the folder" in err
