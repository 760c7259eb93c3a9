"""Compare metrics with values computed by hand."""

import pytest

from vlmzip.lab.tasks.metrics import METRICS, f1, yes_or_no
from vlmzip.lab.tasks.vqa_accuracy import vqa_accuracy, vqa_form


def score(metric, given, *answers):
    return METRICS[metric].score(given, answers)


@pytest.mark.parametrize("given", ["Top Left", " top  left. ", "top left"])
def test_exact_forgives_case_spaces_and_a_full_stop(given):
    assert score("exact", given, "nothing", "top left") == 1
    assert score("exact", given, "top-left") == 0


class TestVqaAccuracy:
    @pytest.mark.parametrize(
        ("same", "mark"),
        [
            # If n of ten annotators agree: (n * min(1, (n-1)/3) + (10-n) * min(1, n/3)) / 10.
            (0, 0.0),
            (1, (1 * 0 + 9 / 3) / 10),
            (2, (2 / 3 + 8 * 2 / 3) / 10),
            (3, (3 * 2 / 3 + 7) / 10),
            (4, 1.0),
            (10, 1.0),
        ],
    )
    def test_it_is_the_mean_over_all_but_one_of_ten_people(self, same, mark):
        assert vqa_accuracy("red", ["red"] * same + ["blue"] * (10 - same)) == pytest.approx(mark)

    @pytest.mark.parametrize(
        ("said", "form"),
        [
            ("The Red car.", "red car"),
            ("two dogs", "2 dogs"),
            ("none", "0"),
            ("dont", "don't"),
            ("couldnt've", "couldn't've"),
            ("its", "its"),  # not a contraction in the challenge's list
            ("yes, it is", "yes it is"),  # a mark beside a space vanishes
            ("t-shirt/jeans", "t shirt jeans"),  # others become one
            ("1,000 - about", "1000 about"),  # a grouped number: all marks vanish
            ("3.5", "3.5"),
            ("a.m.", "am"),
            ("what?!", "what"),
        ],
    )
    def test_both_sides_are_brought_into_one_form(self, said, form):
        assert vqa_form(said) == form

    def test_fewer_than_four_people_cannot_give_full_marks(self):
        assert "4 people" in METRICS["vqa"].unfit(["a", "a", "a"])
        assert METRICS["vqa"].unfit(["a"] * 4) == ""


@pytest.mark.parametrize(
    ("given", "answer", "right"),
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("-95", "-100", 1),
        ("50%", "0.5", 1),
        ("50", "50%", 0),
        ("0", "0", 1),
        ("0.01", "0", 0),  # no relative error from 0
        ("Blue", "blue", 1),
        ("blue.", "blue", 0),
        ("about 100", "100", 0),
    ],
)
def test_relaxed_accuracy(given, answer, right):
    assert score("relaxed", given, answer) == right


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("Yes.", "yes"),
        ("Yes, there is no doubt", "no"),
        ("No, there is not. Yes", "no"),
        ("there is not", "no"),
        ("nothing", ""),
        ("", ""),
        ("YES!", "yes"),
    ],
)
def test_yes_or_no(given, said):
    assert yes_or_no(given) == said


def test_accuracy_and_f1_of_yes():
    said = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"), ("maybe", "yes"), ("yes", "yes")]
    assert [score("yesno", given, answer) for given, answer in said] == [1, 0, 0, 1, 0, 1]
    above, below = (sum(parts) for parts in zip(*(f1(given, [answer]) for given, answer in said), strict=True))
    assert above / below == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))  # TP 2, FP 1, FN 2 ("maybe" is no yes)


@pytest.mark.parametrize("answers", [["maybe"], ["yes", "no"], []])
def test_yesno_needs_yes_or_no(answers):
    assert METRICS["yesno"].unfit(answers)
