"""Questions from files are read unchanged, or refused with file and line."""

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from vlmzip.errors import UserError, how_to_install
from vlmzip.lab.tasks.catalogue import read_task, read_tasks
from vlmzip.lab.tasks.mini import mini_task
from vlmzip.mini.splits import test_split as mini_test_split


def write(folder, *lines, images=("a.png", "b.png", "c.png")):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(images):
        noise = np.random.default_rng(number).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "questions.jsonl").write_text(text)
    return str(folder)


def question(image="a.png", **more):
    return {"image": image, "question": "what ?", "answers": ["it"], **more}


class TestMini:
    def test_it_is_the_test_split_with_its_groups(self):
        task, expected = mini_task(30), mini_test_split(30)
        assert [s.question for s in task.samples] == [s.question for s in expected]
        assert [s.answers for s in task.samples] == [(s.answer,) for s in expected]
        assert [s.groups for s in task.samples] == [{"type": s.type, "level": s.level} for s in expected]
        assert task.samples[7].load().tobytes() == expected[7].image.tobytes()
        assert len({s.id for s in task.samples}) == 30

    def test_calibration_is_on_other_images(self):
        task = mini_task(6)
        images = list(task.calibration.images())
        assert len(images) == 180
        assert task.samples[0].load().tobytes() not in {image.tobytes() for image in images}


class TestEasyVqa:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("easy_vqa")

    def test_its_test_split_is_asked_as_transfer_unless_told_otherwise(self):
        task = read_task("easy-vqa", None, None)
        assert (task.name, len(task.samples), len({s.id for s in task.samples})) == ("easy-vqa:transfer", 9673, 9673)
        assert "not trained on it" in task.about
        assert task.samples[0].question == "what is the red shape?"
        assert task.samples[0].load().size == (64, 64)
        assert "fine-tuned" in read_task("easy-vqa:tuned", 5, None).about

    def test_types(self):
        found = {s.groups["type"] for s in read_task("easy-vqa", 200, None).samples}
        assert found == {"shape", "color", "asserted", "denied"}

    def test_calibration_is_on_training_images(self):
        paths = list(read_task("easy-vqa", 5, None).calibration.images())
        assert len(paths) == 200
        assert all("train" in path for path in paths)


def test_easy_vqa_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(UserError, match=re.escape(how_to_install("eval"))):
        read_task("easy-vqa", None, None)


class TestFolder:
    def test_fields(self, tmp_path):
        more = question("b.png", id="x7", type="odd", answers="one")
        folder = write(tmp_path / "q", question(), "", more, question(answers=[3, "three"]))
        task = read_task(f"{folder}:relaxed", None, None)
        assert [s.id for s in task.samples] == ["1", "x7", "4"]
        assert [s.answers for s in task.samples] == [("it",), ("one",), ("3", "three")]
        assert [dict(s.groups) for s in task.samples] == [{}, {"type": "odd"}, {}]
        assert task.metric.name == "relaxed"
        assert task.calibration is None
        assert "--calibrate-on" in task.uncalibrated

    def test_limit_and_file(self, tmp_path):
        folder = write(tmp_path / "q", question(), question(), question())
        assert len(read_task(f"{folder}/questions.jsonl:exact", 2, None).samples) == 2

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{no", r"questions\.jsonl:2: Expecting property name"),
            ("[]", r"questions\.jsonl:2: a line must be a JSON object"),
            (question(colour="red"), r"questions\.jsonl:2: unknown field 'colour'"),
            ({"image": "a.png", "answers": ["it"]}, r":2: the field 'question' is missing"),
            (question(answers=[]), ":2: image and question must be texts, and answers a list of texts"),
            (question(answers=[None]), ":2: image and question must be texts"),
            (question(id=[1]), ":2: id must be a text or a number"),
            (question(type=None), ":2: type must be a text or a number"),
            (question(id="1"), ":2: the id '1' occurs twice"),
        ],
    )
    def test_a_wrong_line_is_named(self, tmp_path, line, message):
        folder = write(tmp_path / "q", question(), line, question())
        with pytest.raises(UserError, match=message):
            read_task(f"{folder}:exact", None, None)

    @pytest.mark.parametrize("metric", ["vqa", "yesno"])
    def test_answers_that_a_metric_cannot_use(self, tmp_path, metric):
        folder = write(tmp_path / "q", question())
        with pytest.raises(UserError, match=r":1: (VQA accuracy|yesno) needs"):
            read_task(f"{folder}:{metric}", None, None)

    def test_unreadable_images_are_refused_at_once_with_their_number(self, tmp_path):
        names = ["a.png", "torn.png", "text.png", "missing.png", "b.png", "torn.png"]
        folder = write(tmp_path / "q", *(question(name) for name in names))
        whole = (tmp_path / "q" / "a.png").read_bytes()
        (tmp_path / "q" / "torn.png").write_bytes(whole[: len(whole) // 2])
        (tmp_path / "q" / "text.png").write_text("no image")
        with pytest.raises(UserError, match=r"3 of 5 images cannot be read; the first: '.*torn\.png' cannot be read"):
            read_task(f"{folder}:exact", None, None)
        assert len(read_task(f"{folder}:exact", 1, None).samples) == 1  # images without questions are not checked

    def test_calibration_images_are_others(self, tmp_path):
        folder, other = write(tmp_path / "q", question()), write(tmp_path / "o")
        task = read_task(f"{folder}:exact", None, other)
        assert [path.rpartition("/")[2] for path in task.calibration.images()] == ["a.png", "b.png", "c.png"]
        (tmp_path / "o" / "d.png").symlink_to(tmp_path / "q" / "a.png")
        with pytest.raises(UserError, match=r"has images with questions in the task, such as d\.png"):
            read_task(f"{folder}:exact", None, other)

    @pytest.mark.parametrize("calibrate_on", ["nowhere", "empty"])
    def test_no_calibration_images(self, tmp_path, calibrate_on):
        folder = write(tmp_path / "q", question())
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "a.eps").write_text("%!PS")  # Pillow would start a program to read it
        with pytest.raises(UserError, match=r"must be a folder of images|no image in the folder"):
            read_task(f"{folder}:exact", None, str(tmp_path / calibrate_on))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" ,", "names no task"),
        ("mimi", "unknown task or folder 'mimi'; did you mean 'mini'"),
        ("easy-vqa:tunde", "did you mean 'tuned'"),
        ("{folder}", "needs a metric after a colon"),
        ("{folder}:exakt", "unknown metric 'exakt'; did you mean 'exact'"),
        ("{folder}/empty:exact", "must have one .jsonl file with the questions, found none"),
        ("{folder}/none.jsonl:exact", "there is no question"),
        ("{folder}/bytes.jsonl:exact", r"bytes\.jsonl:1: byte 1 is not UTF-8; save the file as UTF-8"),
    ],
)
def test_tasks_that_there_are_not(tmp_path, text, message):
    folder = write(tmp_path / "q", question())
    (tmp_path / "q" / "empty").mkdir()
    (tmp_path / "q" / "none.jsonl").write_text("\n\n")
    (tmp_path / "q" / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=message):
        read_tasks(text.format(folder=folder), None, None)
