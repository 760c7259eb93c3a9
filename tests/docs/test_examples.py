"""The scripts and notebooks in examples/ run, and the notebooks hold what running them gives."""

import importlib.util
import re
from copy import deepcopy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, capsys):
    """Return a function that runs a script from the repository's root, and returns what it prints."""
    monkeypatch.chdir(EXAMPLES.parent)

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(list(arguments))
        return capsys.readouterr().out

    return run


def test_the_readme_names_every_example():
    named = set(re.findall(r"`([\w.]+\.(?:py|ipynb|png))`", (EXAMPLES / "README.md").read_text()))
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb", ".png")}
    assert named == files


def test_links_lead_somewhere():
    texts = [path.read_text(encoding="utf-8") for path in EXAMPLES.iterdir() if path.suffix in (".md", ".ipynb")]
    links = [link for text in texts for link in re.findall(r"\]\(([^)#:]+)", text)]
    assert "../docs/add_a_method.md" in links
    assert [link for link in links if not (EXAMPLES / link).exists()] == []


@pytest.mark.slow
def test_answer(run):
    assert run("answer") == "all visual tokens: orange\n36 of 144: orange\n"
    few = run("answer", "examples/flat.png", "what item is there ?", "--keep", "16")
    assert few.splitlines()[1].startswith("16 of 144: ")


@pytest.mark.slow
def test_batch_report(run):
    lines = [line.split() for line in run("batch_report").splitlines()]
    assert [line[0] for line in lines[1:4]] == [f"examples/{name}.png" for name in ("flat", "first", "cluttered")]
    assert [line[1:3] for line in lines[1:4]] == [["144", "36"]] * 3
    assert lines[1][-1] == "boot"
    assert lines[-1][-1] == "108"


@pytest.mark.slow
def test_train_gains(run, tmp_path):
    out = run("train", "--steps", "30", "--questions", "240", "--out", str(tmp_path / "tuned"))
    gained = float(re.search(r"([+-][\d.]+) points, with 16 of 144", out)[1])
    assert gained > 0
    assert (tmp_path / "tuned" / "compressor.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["quickstart", "write_a_method"])
def test_notebooks_hold_what_running_gives(maker, name):
    notebooks = maker("notebooks")
    path = EXAMPLES / f"{name}.ipynb"
    assert path in notebooks.NOTEBOOKS
    assert notebooks.differences(notebooks.read(path), notebooks.executed(path)) == []


def test_seven_cells_write_a_method(maker):
    notebooks = maker("notebooks")
    assert len(notebooks.code_cells(notebooks.read(EXAMPLES / "write_a_method.ipynb"))) == 7


def test_other_outputs_are_seen(maker):
    notebooks = maker("notebooks")
    committed = notebooks.read(EXAMPLES / "quickstart.ipynb")
    cells = notebooks.code_cells(committed)
    assert all(cell.outputs for cell in cells)
    assert notebooks.differences(committed, deepcopy(committed)) == []
    for number in range(1, len(cells) + 1):
        changed = deepcopy(committed)
        (output,) = notebooks.code_cells(changed)[number - 1].outputs
        if output.output_type == "stream":
            output.text = output.text.replace("3", "5")
        elif "image/png" in output.data:
            output.data["image/png"] = cells[0 if number > 1 else 3].outputs[0].data["image/png"]
        else:
            output.data["text/plain"] = "'left'"
        assert [line.partition(":")[0] for line in notebooks.differences(committed, changed)] == [f"cell {number}"]
