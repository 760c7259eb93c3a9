"""The rule that chooses the images of the first figure, and the plots drawn from committed results."""

from pathlib import Path
from types import SimpleNamespace

from matplotlib.figure import Figure


def question(level, type_):
    return SimpleNamespace(level=level, type=type_)


def test_the_first_question_of_each_level_is_shown(maker):
    figures = maker("figures")
    first, second = question("cluttered", "exist"), question("cluttered", "read")
    flat, patterned, read = question("flat", "read"), question("patterned", "exist"), question("patterned", "read")
    questions = [first, flat, second, patterned, read, question("flat", "exist")]
    assert figures.first_of_each_level(questions, lambda _: True) == [flat, patterned, first]
    assert figures.first_of_each_level(questions, lambda q: q.type == "read") == [flat, read, second]


def test_plots_are_drawn_from_committed_results(maker, monkeypatch):
    drawn = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.update({Path(path): titles(figure)}))
    plots = maker("plots")
    plots.main()
    assert all(path.exists() for path in drawn)
    study = {path for path in (plots.FIGURES / "study").glob("*.png") if not path.stem.endswith("-maps")}
    assert set(drawn) == study | {plots.FIGURES / f"mini_{cost}.png" for cost in ("tokens", "flops")}
    assert all("\nmini on " in title and "questions of mini's test split" in title for title in drawn.values())


def titles(figure):
    return "\n".join([figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]).strip()
