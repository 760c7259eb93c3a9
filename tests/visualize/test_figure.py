"""Figures show names with `$` verbatim, not as mathematics."""

import io
from collections import namedtuple
from types import SimpleNamespace

import pytest
from matplotlib.image import imread

from tests.cli.test_eval import write_questions
from tests.cli.test_study import table
from tests.families import save_checkpoint
from vlmzip.cli.main import main
from vlmzip.training.explain import draw_staircase
from vlmzip.visualize.figure import new_figure
from vlmzip.visualize.histogram import draw_deviations

#: Matplotlib cannot parse the first name as mathematics; it can parse the second, and would draw it as mathematics.
NAMES = [r"cost $5 and \frac $10", "from $5 to $10"]


def drawn(figure, kind="png"):
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind)
    return buffer.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_every_text_but_tick_labels_is_verbatim(name):
    figures = []
    for parse in (None, False):
        figure = new_figure(4, 3)
        axes = figure.subplots()
        axes.plot([1, 100], [1, 2], label=name)
        axes.set_xscale("log")
        axes.legend()
        figure.legend(loc="outside right upper")
        figure.suptitle(name)
        axes.set(title=name, xlabel=name, ylabel=name)
        texts = [*axes.get_legend().get_texts(), *figure.legends[0].get_texts(), figure._suptitle, axes.title]
        texts += [axes.xaxis.label, axes.yaxis.label, axes.text(2, 1.5, name), axes.annotate(name, (3, 1.2))]
        if parse is False:
            for text in texts:
                text.set_parse_math(False)
        figures.append(drawn(figure))
        assert not any(text.get_parse_math() for text in texts)
        assert all(tick.get_parse_math() for tick in axes.get_xticklabels())  # powers of 10
    assert (imread(io.BytesIO(figures[0])) == imread(io.BytesIO(figures[1]))).all()


@pytest.mark.parametrize("name", NAMES)
def test_histograms(name):
    assert draw_deviations([{2: 0.3}, {2: 0.4}], 0.35, name).width > 900


@pytest.mark.parametrize("name", NAMES)
def test_staircases(name):
    stage = namedtuple("Stage", "begins ends tokens of ratio compressor")(0, 1, 50, 100, 2.0, name)
    assert drawn(draw_staircase(SimpleNamespace(stages=[stage]), name))


@pytest.mark.slow
def test_eval_and_study_of_a_task_with_such_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlmzip.lab.analyses.tau.TAUS", (0.0, 0.8))
    save_checkpoint(tmp_path / "tiny")
    write_questions(tmp_path / NAMES[0])
    common = ["--model", "tiny", "--batch", "4"]
    assert main(["eval", *common, "--tasks", f"{NAMES[0]}:exact", "--methods", "pool2d", "--out", "e", "--report"]) == 0
    study = ["study", *common, "--task", f"{NAMES[0]}:exact", "--out", "s", "--limit", "6"]
    assert main([*study, "ablation", "attention_by_depth", "context", "encoder_attention", "tau"]) == 0
    assert len(list((tmp_path / "s").glob("*.svg"))) == 5
    assert "cost" in (tmp_path / "s" / "tau.svg").read_text()
    assert {row["task"] for row in table(tmp_path / "s" / "tau.csv")} == {NAMES[0]}
    assert len(list((tmp_path / "e").glob("*.png"))) == 2
