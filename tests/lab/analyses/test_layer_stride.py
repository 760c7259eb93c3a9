"""Score over layer and stride: which settings are tried, and that each row is the setting's own result."""

import pytest

from tests.lab.analyses.numbered import numbered_subject
from vlmzip import LLaVolta
from vlmzip.lab.analyses import layer_stride

pytestmark = pytest.mark.slow  # whole runs of an analysis


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(32, [-1, 1, 2, 8, 16, 24]), (8, [-1, 1, 2, 4, 6]), (4, [-1, 1, 2, 3]), (2, [-1, 1]), (1, [-1])],
)
def test_layers_suit_the_depth(depth, expected):
    assert layer_stride.layers(depth) == expected


@pytest.mark.slow
def test_rows_are_the_results_of_their_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(layer_stride, "STRIDES", (4, 5))
    subject = numbered_subject(tmp_path)
    plain, *rows = layer_stride.measure(subject)
    assert (plain["method"], plain["reached"], plain["questions"]) == ("no_compression", 100, 7)
    tried = [(row["layer"], row["stride"]) for row in rows]
    assert tried == [(layer, stride) for layer in (-1, 1, 2, 3) for stride in (4, 5)]
    for row in rows:
        full, kept = max(row["layer"], 0), 36 // row["stride"]
        assert row["reached"] == pytest.approx(100 * (36 * full + kept * (4 - full)) / (36 * 4), abs=0.01)
    _, alone = subject.ask([LLaVolta(layer=1, stride=5)])
    assert layer_stride.scored(alone).items() <= rows[tried.index((1, 5))].items()


def row(layer, stride, score, reached, high):
    return {
        "method": "llavolta", "layer": layer, "stride": stride, "score": score, "reached": reached,
        "difference": score - 80, "difference_low": score - 83, "difference_high": high,
    }  # fmt: skip


def test_what_is_shown_of_a_table():
    plain = {"method": "no_compression", "layer": "", "stride": "", "score": 80, "questions": 40}
    tried = [row(-1, 2, 50, 50, -20), row(-1, 4, 40, 25, -30), row(2, 2, 79, 75, 1), row(2, 4, 78, 63, 0.5)]
    figure = layer_stride.draw([plain, *tried], "title")
    axes = figure.axes[0]
    assert axes.images[0].get_array().tolist() == [[-30, -40], [-1, -2]]
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {
        ((0, 0), "50.0\n50 % of tokens"), ((1, 0), "40.0\n25 % of tokens"),
        ((0, 1), "79.0\n75 % of tokens"), ((1, 1), "78.0\n63 % of tokens"),
    }  # fmt: skip
    first, second = layer_stride.findings([plain, *tried])
    assert "before the LLM: 40.0, 2: 78.0" in first
    assert "40 questions cannot tell a loss from none: K=2, S=4, 63.0 % of the tokens, -2.0 points" in second
    assert "a loss of 5.0 is not ruled out" in second
    assert (
        "Every layer and stride that was tried loses for sure, with 40 questions"
        in layer_stride.findings([plain, *tried[:2]])[1]
    )
