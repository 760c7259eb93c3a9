"""The sweep over tau: groups of images, their means, and what may be said of a loss."""

import pytest

from tests.lab.analyses.subjects import make_subject
from vlmzip.lab.analyses import tau
from vlmzip.lab.analyses.tau import draw, findings, image_groups, measure
from vlmzip.lab.records import read_records

pytestmark = pytest.mark.slow  # whole runs of an analysis


def record(image, **groups):
    return {"image": image, "groups": groups}


class TestGroups:
    def test_a_group_sorts_images_if_all_questions_about_one_share_it(self):
        records = [
            record("a", type="color", level="flat"),
            record("a", type="count", level="flat"),
            record("b", type="color", level="rich"),
        ]
        assert image_groups(records) == [("level", "flat"), ("level", "rich")]

    def test_a_group_that_some_records_lack_is_none(self):
        assert image_groups([record("a", level="flat"), record("b")]) == []

    def test_a_group_of_many_values_is_none(self):
        names = [record(str(n), level=str(n)) for n in range(tau.MOST_VALUES + 1)]
        assert image_groups(names) == []
        assert len(image_groups(names[1:])) == tau.MOST_VALUES

    def test_a_task_without_groups_has_none(self):
        assert image_groups([record("a"), record("b")]) == []


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    subject = make_subject(tmp_path_factory.mktemp("tau"))
    with pytest.MonkeyPatch.context() as patched:
        # Between the deviations of the three images of noise, so that images differ in what they keep.
        patched.setattr(tau, "TAUS", (0.0, 0.72, 2.0))
        yield measure(subject), subject


def test_tokens_and_scores_of_groups_are_those_of_their_records(measured):
    rows, subject = measured
    assert [row["tau"] for row in rows] == [0, 0.72, 2]
    assert [rows[0]["tokens"], rows[-1]["tokens"]] == [36, 4]
    (path,) = (subject.folder / "records").rglob("dfmr-tau=0.72*.jsonl")
    records = read_records([path]).values()
    for level, count in (("plain", 7), ("rich", 3)):
        mine = [one for one in records if one["groups"]["level"] == level]
        tokens = sum(one["visual_tokens_by_layer"][0] for one in mine) / len(mine)
        score = 100 * sum(one["score"] for one in mine) / len(mine)
        assert rows[1][f"questions_level_{level}"] == len(mine) == count
        assert rows[1][f"tokens_level_{level}"] == pytest.approx(tokens, abs=0.006)
        assert rows[1][f"score_level_{level}"] == pytest.approx(score, abs=0.006)
        assert rows[1][f"difference_level_{level}"] == pytest.approx(score - rows[0][f"score_level_{level}"], abs=0.02)
    assert rows[1]["tokens_level_plain"] != rows[1]["tokens_level_rich"]
    assert not any("type" in name for name in rows[1])


def test_the_figure_has_a_thin_line_for_each_group(measured):
    rows, _ = measured
    above, below = draw(rows, "a title").axes
    assert [line.get_label() for line in above.get_lines()] == ["all images", "level: plain", "level: rich"]
    assert [list(line.get_ydata()) for line in below.get_lines()] == [
        [row[name] for row in rows] for name in ("tokens", "tokens_level_plain", "tokens_level_rich")
    ]


def row(tau, reached, difference, low, high):
    return {
        "tau": tau, "reached": reached, "score": 80 + difference, "questions": 400, "tokens": reached,
        "difference": difference, "difference_low": low, "difference_high": high,
        "score_level_flat": 80 + 2 * difference, "tokens_level_flat": reached / 2, "questions_level_flat": 100,
        "difference_level_flat": 2 * difference, "difference_level_flat_low": 2 * low,
        "difference_level_flat_high": 2 * high,
    }  # fmt: skip


class TestFindings:
    def test_a_sure_loss_ends_the_search_for_savings(self):
        rows = [
            row(0, 100, 0, 0, 0),
            row(0.2, 70, -1, -2.5, 0.5),
            row(0.3, 48, -3, -5, -1),
            row(0.4, 30, -2, -4.5, 0.5),
        ]
        _, text, flat = findings(rows)
        assert text == (
            "The largest saving without a significant loss with 400 questions is at tau=0.2: 70.0 % of the"
            " tokens, -1.0 points (-2.5 to +0.5), so that a loss of up to 2.5 points is not ruled out."
        )
        assert flat == (
            "At tau=0.3, with 48.0 % kept, level flat has 24.0 tokens an image and -6.0 points (-10.0 to -2.0) of 100"
            " questions."
        )

    def test_no_loss_at_all(self):
        text = findings([row(0, 100, 0, 0, 0), row(0.2, 60, 2, 1, 3)])[1]
        assert "at tau=0.2: 60.0 % of the tokens, +2.0 points" in text
        assert "a loss of up to 0.0 points is not ruled out" in text

    def test_a_loss_from_the_first_saving_on(self):
        rows = [row(0, 100, 0, 0, 0), row(0.1, 100, 0, 0, 0), row(0.2, 60, -8, -9, -7), row(0.3, 50, -1, -3, 1)]
        assert findings(rows)[1] == (
            "With 400 questions, the smallest saving that was tried already costs a loss beyond the 95 % interval:"
            " tau=0.2 keeps 60.0 % of the tokens, -8.0 points (-9.0 to -7.0)."
        )

    def test_nothing_saved(self):
        assert findings([row(0, 100, 0, 0, 0), row(0.1, 100, 0, 0, 0)])[1] == "No tau that was tried saves tokens."
