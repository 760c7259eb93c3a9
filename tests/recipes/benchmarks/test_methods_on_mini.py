"""The table of methods on mini resumes where it was stopped, and measures again what other code gave."""

import csv

import pytest

from recipes.benchmarks import methods_on_mini
from vlmzip import VisionZip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the script on one method; return how many configurations it measured, and the rows of the table."""
    path, measured, row_of = tmp_path / "table.csv", [], methods_on_mini.row_of

    def counted(*asked):
        measured.append(asked)
        return row_of(*asked)

    def run(code):
        monkeypatch.setattr(methods_on_mini, "fingerprint", lambda: code)
        measured.clear()
        methods_on_mini.main()
        with path.open() as file:
            return len(measured), list(csv.DictReader(file))

    monkeypatch.setattr("sys.argv", ["methods_on_mini.py", "--out", str(path), "--limit", "2"])
    monkeypatch.setattr(methods_on_mini, "settings", lambda: iter([VisionZip()]))
    monkeypatch.setattr(methods_on_mini, "row_of", counted)
    return run


def test_rows_are_measured_once_by_the_same_code(run):
    first, rows = run("code of today")
    assert (first, len(rows)) == (6, 6)
    again, same = run("code of today")
    assert (again, same) == (0, rows)
    changed, rows = run("code of tomorrow")
    assert (changed, [row["budget"] for row in rows]) == (6, ["100%", *methods_on_mini.BUDGETS])
    assert {row["fingerprint"] for row in rows} == {"code of tomorrow"}
