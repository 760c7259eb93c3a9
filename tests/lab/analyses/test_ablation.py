"""Dominant and contextual tokens alone and together: equal counts, what becomes of CLS, differences from both."""

import pytest
import torch

from tests.lab.analyses.subjects import Lines, make_subject
from vlmzip import VisionZip
from vlmzip.lab.analyses.ablation import (
    BOTH,
    CONTEXTUAL,
    DOMINANT,
    MERGES,
    _against,
    _variant,
    draw,
    findings,
    measure,
)
from vlmzip.lab.analyses.subject import Unsuited
from vlmzip.lab.results import Result
from vlmzip.visual_tokens import Grid, VisualTokens

pytestmark = pytest.mark.slow  # whole runs of an analysis


@pytest.mark.parametrize(("share", "count", "split"), [("25%", 144, (121, 23)), ("11%", 63, (53, 10))])
def test_all_parts_have_the_same_count(share, count, split):
    parts = {
        (part, merge): _variant(576, share, merge, part) for part in (BOTH, DOMINANT, CONTEXTUAL) for merge in MERGES
    }
    assert {one.token_count(Grid(1, 24, 24)) for one in parts.values()} == {count}
    assert parts[BOTH, "mean"] == VisionZip(dominant=split[0], contextual=split[1], merge="mean")
    assert parts[CONTEXTUAL, "reference"] == VisionZip(dominant=0, contextual=count)
    assert parts[DOMINANT, "mean"] == parts[DOMINANT, "reference"] == VisionZip(dominant=count, contextual=0)


def test_alone_dominant_tokens_have_cls_and_contextual_ones_do_not():
    tokens = VisualTokens(
        torch.randn(2, 37, 8), Grid(1, 6, 6), 1, cls_attention=torch.rand(2, 37), keys=torch.randn(2, 37, 4)
    )
    dominant = _variant(36, "25%", "reference", DOMINANT)(tokens)
    assert dominant.lengths == [9, 9]
    assert (dominant.group[:, 0] == 0).all()  # CLS comes first
    assert ((dominant.group >= 0).sum(1) == 9).all()  # the rest is dropped, not merged
    contextual = _variant(36, "25%", "mean", CONTEXTUAL)(tokens)
    assert contextual.lengths == [9, 9]
    assert (contextual.group[:, 0] == -1).all()  # CLS is dropped
    assert (contextual.group[:, 1:] >= 0).all()  # every patch is in one of them


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    subject = make_subject(tmp_path_factory.mktemp("ablation"))
    for number, sample in enumerate(subject.task.samples):  # answers that noise gives anyway: some are right
        object.__setattr__(sample, "answers", (["w17", "w80", "it"][number % 3],))
    with Lines() as told:
        rows = measure(subject)
    return rows, told, subject


def test_the_difference_is_the_part_minus_both():
    wrong, right = ([{"image": str(n), "score": score} for n in range(4)] for score in (0, 1))
    few, all_of = Result(None, wrong), Result(None, right)
    assert _against(few, all_of, 0) == dict.fromkeys(("against_both", "against_both_low", "against_both_high"), -100.0)
    assert _against(all_of, few, 0)["against_both"] == 100


class TestOnATinyModel:
    def test_a_row_for_each_part_budget_and_merge(self, measured):
        plain, *rows = measured[0]
        assert (plain["part"], plain["reached"], plain["questions"]) == ("no_compression", 100, 10)
        assert [(row["budget"], row["merge"], row["part"]) for row in rows] == [
            (budget, merge, part)
            for budget in ("25%", "11%")
            for merge in MERGES
            for part in (BOTH, DOMINANT, CONTEXTUAL)
        ]
        assert {row["dominant"] + row["contextual"] for row in rows if row["budget"] == "25%"} == {9}
        assert {row["reached"] for row in rows} == {25, 11.11}

    def test_budgets_without_tokens_of_both_kinds_are_left_out_and_said(self, measured):
        (said,) = [line for line in measured[1] if line.startswith("ablation")]
        assert said == "ablation leaves out 5.6% of 36 tokens, too few for both dominant and contextual ones"

    def test_nothing_is_asked_twice(self, measured):
        rows, told, subject = measured
        before = len(told)
        assert measure(subject) == rows
        assert not [line for line in told[before:] if "questions in" in line]
        # 1 plain, and for each of 2 budgets: both and contextual under 2 merges, dominant once.
        assert len([line for line in told if "questions in" in line]) == 1 + 2 * 5


def test_no_budget_left_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vlmzip.lab.analyses.ablation.SHARES", ("5.6%", "4%"))
    with pytest.raises(Unsuited, match=r"5\.6%, 4% of 36 are too few"):
        measure(make_subject(tmp_path))


def numbers(**more):
    row = {"score": 80.0, "low": 50.0, "high": 95.0, "reached": 100.0, "questions": 200}
    return row | {"against_both": 0.0, "against_both_low": 0.0, "against_both_high": 0.0} | more


@pytest.fixture
def rows():
    made = [numbers(budget="100%", merge="", part="no_compression", dominant="", contextual="", score=90.0)]
    for merge in MERGES:
        for part, score, low, high in ((BOTH, 80, 0, 0), (DOMINANT, 79, -3, 1), (CONTEXTUAL, 60, -24, -16)):
            counts = {"dominant": 30, "contextual": 6}
            difference = {"against_both": score - 80, "against_both_low": low, "against_both_high": high}
            made.append(numbers(budget="25%", merge=merge, part=part, score=score, reached=25, **counts, **difference))
    return made


def test_findings_say_what_cannot_be_told_apart(rows):
    text = findings(rows)
    assert text[0] == "Without compression the score is 90.0 (200 questions)."
    assert len(text) == 3
    assert text[1] == (
        "25%, merge reference: both (30 + 6) 80.0; dominant alone 79.0 (-1.0 points, -3.0 to +1.0, no significant"
        " difference from both); contextual alone 60.0 (-20.0 points, -24.0 to -16.0)."
    )


def test_the_figure_has_a_panel_for_each_merge(rows):
    panels = draw(rows, "a title").axes
    assert [axes.get_title() for axes in panels] == ["merge: reference", "merge: mean"]
    for axes in panels:
        drawn = [list(line.get_ydata()) for line in axes.get_lines()]
        assert [values for values in drawn if values in ([80], [79], [60])] == [[80], [79], [60]]
        assert [90.0, 90.0] in drawn
