"""One list of columns, rendered for people and for programs."""

import csv
import json
from dataclasses import dataclass

from vlmzip.lab.table import ABSENT, Column, Table, table_of


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


ROWS = [
    {"name": "a_b", "share": Interval(0.25, 0.5), "tokens": 1234},
    {"name": "50% | x", "share": ABSENT, "tokens": None},
]
COLUMNS = [
    Column(lambda row: row["name"], "method", key="method", csv=("method",)),
    Column(
        lambda row: row["share"], "share", lambda share: f"{share.low:.0%} ± {share.high - share.low:.0%}", "share",
        ("low", "high"), lambda share: (f"{share.low:.3f}", f"{share.high:.3f}"),
    ),
    Column(lambda row: row["tokens"], "tokens", "{:,}".format, "tokens", ("tokens",)),
    Column(lambda row: len(row), key="fields"),
]  # fmt: skip


def test_people_see_headings_and_a_dash_where_there_is_nothing(capsys):
    table = Table(COLUMNS, ROWS)
    assert table.headings == ["method", "share", "tokens"]
    assert [table.texts(row) for row in ROWS] == [["a_b", "25% ± 25%", "1,234"], ["50% | x", "—", "—"]]
    table.print()
    assert capsys.readouterr().out.splitlines()[1].split() == ["a_b", "25%", "±", "25%", "1,234"]


def test_people_can_see_some_columns_in_another_order():
    table = Table(COLUMNS, ROWS, shown=["tokens", "method"])
    assert (table.headings, table.texts(ROWS[0])) == (["tokens", "method"], ["1,234", "a_b"])


def test_numbers_stand_on_the_right_and_never_wrap(monkeypatch, capsys):
    columns = [Column(lambda row: row, "text"), Column(len, "number", align="right", wraps=False)]
    Table(columns, ["a" * 300, "b"]).print()
    head, *_, last = capsys.readouterr().out.splitlines()
    assert (head.endswith("  number"), last.split(), len(last)) == (True, ["b", "1"], len(head))
    assert Table(columns, ["a", "b"]).text() == "text  number\na          1\nb          1\n"


def test_dictionaries_are_rows_too():
    rows = [{"layer": "", "score": 61.5}, {"layer": 2, "score": None}]
    table = table_of(rows, {"model": "mini"})
    assert table.as_json() == rows
    assert table.as_csv() == [{"layer": "", "score": 61.5, "model": "mini"}, {"layer": 2, "score": "", "model": "mini"}]


def test_json_leaves_out_what_a_row_does_not_have():
    first, second = json.loads(json.dumps(Table(COLUMNS, ROWS).as_json()))
    assert first == {"method": "a_b", "share": {"low": 0.25, "high": 0.5}, "tokens": 1234, "fields": 3}
    assert second == {"method": "50% | x", "tokens": None, "fields": 3}


def test_csv_has_a_cell_for_every_name_that_some_row_has(tmp_path):
    Table(COLUMNS, ROWS).write_csv(tmp_path / "it.csv")
    with (tmp_path / "it.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"method": "a_b", "low": "0.250", "high": "0.500", "tokens": "1234"},
            {"method": "50% | x", "low": "", "high": "", "tokens": ""},
        ]
    assert list(Table(COLUMNS, ROWS[1:]).as_csv()[0]) == ["method", "tokens"]


def test_markdown_and_latex_escape_what_they_would_read_as_commands():
    table = Table(COLUMNS, ROWS)
    assert table.markdown().splitlines()[::3] == ["| method | share | tokens |", r"| 50% \| x | — | — |"]
    lines = table.latex().splitlines()
    assert (lines[0], lines[-1]) == (r"\begin{tabular}{lrr}", r"\end{tabular}")
    assert lines[4:6] == [r"  a\_b & 25\% $\pm$ 25\% & 1,234 \\", r"  50\% | x & --- & --- \\"]
