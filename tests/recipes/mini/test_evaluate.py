"""The measuring of answers, with answerers that need no model."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recipes.mini import evaluate
from recipes.mini.evaluate import (
    AnswerRecord,
    accuracy,
    by,
    controlled,
    majority,
    normalized,
    share_right,
    table,
    write_json,
)
from vlmzip.mini.splits import validation_split

SAMPLES = validation_split(120)


def oracle(images: list[Image.Image], questions: list[str]) -> list[str]:
    answers = {(sample.image.tobytes(), sample.question): sample.answer for sample in SAMPLES}
    return [answers[image.tobytes(), question] for image, question in zip(images, questions, strict=True)]


def test_an_oracle_is_always_right() -> None:
    records = accuracy(oracle, SAMPLES, batch=50)
    assert share_right(records) == 1
    assert set(by(records, "type").values()) == {1.0}
    assert [record.question for record in records] == [sample.question for sample in SAMPLES]


def test_always_yes_is_right_where_yes_is_the_answer() -> None:
    records = accuracy(lambda images, questions: ["yes"] * len(images), SAMPLES)
    shares = by(records, "type")
    yes = [sample.answer == "yes" for sample in SAMPLES if sample.type == "exist"]
    assert shares["exist"] == pytest.approx(sum(yes) / len(yes))
    assert shares["color"] == 0


@pytest.mark.parametrize("given", ["Top Left", " top  left ", "top left.", "top left"])
def test_case_spaces_and_a_full_stop_do_not_matter(given: str) -> None:
    assert normalized(given) == "top left"


def test_a_word_more_or_less_is_wrong() -> None:
    assert not AnswerRecord(0, "", "top left", "top", "where", "flat").right
    assert not AnswerRecord(0, "", "34", "347", "read", "flat").right


def test_missing_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="answers came back"):
        accuracy(lambda images, questions: [], SAMPLES[:3])


def test_majority_counts_the_most_frequent_answer() -> None:
    records = [AnswerRecord(0, "", answer, "", "count", "flat") for answer in "1123"]
    assert majority(records) == {"count": 0.5}


def test_table_has_a_row_for_each_type_and_all() -> None:
    lines = table(accuracy(oracle, SAMPLES)).splitlines()
    assert lines[-1].startswith(f"| all | {len(SAMPLES)} | 100.0 |")
    assert len(lines) == 2 + 9 + 1


def test_text_only_control_hides_the_image() -> None:
    for sample in controlled(SAMPLES, "text-only"):
        assert np.ptp(np.asarray(sample.image)) == 0


def test_shuffled_control_never_shows_the_own_image() -> None:
    own = {sample.seed: sample.image.tobytes() for sample in SAMPLES}
    for sample in controlled(SAMPLES, "shuffled"):
        assert sample.image.tobytes() != own[sample.seed]
        assert sample.image.tobytes() in own.values()


def test_downsampled_control_keeps_size_but_not_detail() -> None:
    for before, after in zip(SAMPLES[:12], controlled(SAMPLES[:12], "downsampled"), strict=True):
        assert after.image.size == before.image.size
        assert after.question == before.question
        edges = [np.abs(np.diff(np.asarray(image, float), axis=0)).mean() for image in (before.image, after.image)]
        assert edges[1] < edges[0]


def test_no_control_changes_nothing() -> None:
    assert controlled(SAMPLES, "none") == SAMPLES


def test_json_holds_every_answer(tmp_path: Path) -> None:
    write_json(accuracy(oracle, SAMPLES), tmp_path / "out.json", split="validation")
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["all"] == 1
    assert content["split"] == "validation"
    assert len(content["records"]) == len(SAMPLES)


def test_a_folder_without_a_model_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--model", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
