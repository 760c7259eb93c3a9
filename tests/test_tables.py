"""The README's table agrees with committed results, and `--check` notices where it does not."""

import csv
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COLUMNS = ("task", "method", "budget", "score", "low", "high", "reached", "note")
STUDY = [
    ("mini", "no_compression", "100%", "88.00", "86.90", "89.10", "1.0000", ""),
    ("mini", "pool2d", "50%", "", "", "", "", "the nearest to 50.0% that it has is 25.0%"),
    ("mini", "pool2d", "25%", "76.25", "75.00", "77.50", "0.2500", ""),
    ("mini", "dfmr", "50%", "80.00", "79.00", "81.20", "0.5556", ""),
    ("mini", "dfmr", "25%", "70.00", "69.00", "71.00", "0.2500", ""),
    ("mini", "qformer", "50%", "", "", "", "", "left out"),
    ("mini", "qformer", "25%", "", "", "", "", "left out"),
    ("easy-vqa:transfer", "dfmr", "25%", "50.00", "49.00", "51.00", "0.2500", ""),
]


@pytest.fixture
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path):
    """A repository with a README and a full study."""
    (tmp_path / "README.md").write_text("above\n\n<!-- results -->\nold\n<!-- end of results -->\n\nbelow\n")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    with (results / "mini-study.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *STUDY])
    return tmp_path


def test_the_readme_agrees_with_the_committed_results(tables, capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_study_becomes_a_table(tables, root):
    assert tables.main([], root) == 0
    assert (root / "README.md").read_text() == (
        "above\n\n<!-- results -->\n"
        "| method | 50% | 25% |\n"
        "| --- | --- | --- |\n"
        "| `no_compression`, all tokens | 88.0 ± 1.1 | |\n"
        "| `pool2d` | — | 76.2 ± 1.2 |\n"
        "| `dfmr` | 80.0 ± 1.1 (55.6%) | 70.0 ± 1.0 |\n"
        "<!-- end of results -->\n\nbelow\n"
    )
    assert tables.main(["--check"], root) == 0


def test_check_notices_a_difference_and_writes_nothing(tables, root, capsys):
    tables.main([], root)
    text = (root / "README.md").read_text().replace("76.2", "79.2")
    (root / "README.md").write_text(text)
    assert tables.main(["--check"], root) == 1
    out, err = capsys.readouterr()
    assert "-| `pool2d` | — | 79.2 ± 1.2 |" in out
    assert "README.md differs from the committed results" in err
    assert (root / "README.md").read_text() == text


@pytest.mark.parametrize("text", ["nothing", "<!-- results -->\n<!-- results -->\n<!-- end of results -->"])
def test_a_readme_without_its_comments_is_an_error(tables, root, text):
    (root / "README.md").write_text(text)
    with pytest.raises(ValueError, match="there should be one"):
        tables.main(["--check"], root)
