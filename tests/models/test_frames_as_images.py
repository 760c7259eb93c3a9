"""InternVL and SmolVLM take the frames of a video as images: their processors put both into `pixel_values`."""

import json
import shlex

import pytest
import torch
from PIL import Image
from transformers import InternVLProcessor, PreTrainedTokenizerFast, SmolVLMProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

import vlmzip
from tests.clips import FramesOfVideos, grey, write_clip
from tests.families.qwen2_5_vl import ImagesOnly
from tests.models import test_default_family
from tests.models.test_default_family import internvl, smolvlm
from tests.tiny import IMAGE_TOKEN, tiny_tokenizer
from vlmzip import DFMR
from vlmzip.cli import ask, show
from vlmzip.cli.main import main
from vlmzip.lab.asking import build_inputs
from vlmzip.models import family_of
from vlmzip.runtime.loading import Loaded
from vlmzip.runtime.videos import Clip

TEMPLATE = (
    "{% for part in messages[0].content %}"
    "{{ {'image': '<image>', 'video': '<video>', 'text': part.text}[part.type] }} {% endfor %}"
)


class Frames(FramesOfVideos):
    model_input_names = ("pixel_values", "pixel_attention_mask")


class InternVL(ImagesOnly, InternVLProcessor):
    pass


class SmolVLM(ImagesOnly, SmolVLMProcessor):
    pass


def tokenizer(**special):
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={**special, "video_token": "<video>"},
    )


def internvl_processor():
    words = tokenizer(start_image_token="w97", end_image_token="w96", context_image_token="<image>")
    images = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32})
    processor = InternVL(images, words, None, image_seq_length=4, chat_template=TEMPLATE)
    processor.video_processor = FramesOfVideos(GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}))
    return processor


def smolvlm_processor():
    processing_smolvlm.num2words = str  # it is not installed
    words = tokenizer(image_token="<image>", fake_image_token="w97", global_image_token="w96")
    side = {"longest_edge": 32}
    images = SmolVLMImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    processor = SmolVLM(images, words, None, image_seq_len=4, chat_template=TEMPLATE)
    frames = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32})
    processor.video_processor = Frames(frames, name="pixel_values", num_frames=64, fps=5)
    return processor


MODELS = {"internvl": (internvl, internvl_processor), "smolvlm": (smolvlm, smolvlm_processor)}
if "smolvlm" not in test_default_family.MODELS:  # it needs a newer transformers
    del MODELS["smolvlm"]
over_models = pytest.mark.parametrize("name", MODELS)


def loaded(name):
    torch.manual_seed(0)
    model, processor = (make() for make in MODELS[name])
    return Loaded(name, model.eval(), processor, family_of(model))


def clip(frames=4):
    return Clip("a.mp4", [grey(50 * n, (40, 30), 40) for n in range(frames)], list(range(frames)), frames, 10.0)


@over_models
@torch.no_grad()
def test_without_compression_a_video_is_the_plain_models(name):
    tiny = loaded(name)
    inputs = build_inputs(tiny, [clip(4)], "w9")
    assert "pixel_values_videos" not in inputs
    plain = tiny.model(**inputs).logits
    with vlmzip.attach(tiny.model, "no_compression") as same:
        assert torch.equal(same(**inputs).logits, plain)
        assert [(image.modality, image.before) for image in same.report.images] == [("image", 4)] * 4
    with vlmzip.attach(tiny.model, "visionzip(keep=2)") as small:
        small(**inputs)
        assert [image.after for image in small.report.images] == [2] * 4


@torch.no_grad()
def test_an_image_beside_a_video_keeps_its_place(tmp_path):
    tiny = loaded("internvl")
    grey(200, (32, 32), 50).save(tmp_path / "a.png")
    image, video = str(tmp_path / "a.png"), clip(3)
    alone = build_inputs(tiny, [image], "w9")["pixel_values"]
    inputs = build_inputs(tiny, [video, image], "w9")
    assert torch.equal(inputs["pixel_values"][3:], alone)
    assert (inputs["input_ids"] == IMAGE_TOKEN).sum() == 4 * len(inputs["pixel_values"])
    report = vlmzip.compress_inputs(tiny.model, inputs, "random_tokens(keep_per_view=1)").report
    assert [image.after for image in report.images] == [1, 1, 1, len(alone)]


@over_models
def test_calibration_counts_all_frames_of_a_video(name):
    tiny = loaded(name)
    videos = [clip(4).frames, clip(2).frames]
    calibration = vlmzip.calibrate(tiny.model, videos, DFMR(tau=0.2, max_factor=2), "100%", processor=tiny.processor)
    assert calibration.before == [16, 8]
    assert calibration.after_by_view == [4] * 6


@pytest.fixture
def command(capsys, monkeypatch):
    def run(line, name):
        for module in (ask, show):
            monkeypatch.setattr(module, "load", lambda *_, **__: loaded(name))
        return main(shlex.split(line)), *capsys.readouterr()

    return run


@over_models
def test_commands_count_the_frames_of_a_video_together(command, tmp_path, name):
    pytest.importorskip("av")
    first, second = write_clip(tmp_path / "a.mp4", 12), write_clip(tmp_path / "b.mp4", 3, step=90)
    overlay = tmp_path / "tokens.png"
    line = (
        f"ask {first} {second} w9 --frames 3 --method visionzip --keep 2 --max-new-tokens 2 --json --overlay {overlay}"
    )
    code, out, err = command(line, name)
    assert code == 0, err
    counts = [(video["before"], video["after"], video["frames"]) for video in json.loads(out)["images"]]
    assert counts == [(12, 6, [0, 6, 11]), (12, 6, [0, 1, 2])]
    assert Image.open(overlay).width == 3 * (312 + 16) + 16


def test_what_cannot_be_done_is_said_in_one_line(command, tmp_path):
    pytest.importorskip("av")
    video = write_clip(tmp_path / "a.mp4", 4)
    grey(9, (32, 32)).save(tmp_path / "a.png")
    for line, name, message in (
        (
            f"show {video} --method evs --out {tmp_path}/b.png",
            "internvl",
            "evs compares the frames of a video, and internvl takes each frame as",
        ),
        (
            f"ask {video} w9 --method evs",
            "smolvlm",
            "evs compares the frames of a video, and smolvlm takes each frame as",
        ),
        (
            f"ask {tmp_path}/a.png {video} w9",
            "smolvlm",
            "puts images and videos into the same pixel_values: ask about one",
        ),
    ):
        if name not in MODELS:
            continue
        code, out, err = command(line, name)
        assert (code, out) == (2, "")
        assert message in err.splitlines()[-1]
