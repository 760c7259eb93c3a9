"""Results as rows and columns, rendered for people and for programs.

A command lists its columns once. A column says how a row's value looks to people, under a heading, and how it stands in
files: under a key in JSON, and under one or several names in CSV.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from rich import console
from rich.markup import escape
from rich.table import Table as RichTable

from vlmzip.files import write_csv

R = TypeVar("R")
#: What people see where a row has no value.
NOTHING = "—"
#: The value of a row that does not have a column at all: JSON leaves the key out, and a cell of CSV is empty.
ABSENT: Any = type("Absent", (), {"__repr__": lambda self: "ABSENT"})()
#: Line width where no screen limits it.
WIDE = 240


@dataclass(frozen=True)
class Column(Generic[R]):
    """One column: what a row has, and how it is shown."""

    value: Callable[[R], Any]
    heading: str = ""
    """What people see above it; empty: it stands in files alone."""
    text: Callable[[Any], str] = str
    """The value for people."""
    key: str = ""
    """Its name in JSON; empty: it is not there."""
    csv: tuple[str, ...] = ()
    """Its names in CSV. Several: `cells` gives as many."""
    cells: Callable[[Any], object] = lambda value: value
    """The value for CSV, or a tuple of values."""


@dataclass(frozen=True)
class Table(Generic[R]):
    """Rows under columns."""

    columns: Sequence[Column[R]]
    rows: Sequence[R]
    shown: Sequence[str] | None = None
    """The headings that people see, in their order; `None`: all, in the order of the columns."""

    @property
    def headings(self) -> list[str]:
        return [column.heading for column in self.columns if column.heading] if self.shown is None else [*self.shown]

    def texts(self, row: R) -> list[str]:
        """Return a row for people, a text for each heading."""
        by_heading = {column.heading: column for column in self.columns}
        return [_text(by_heading[heading], row) for heading in self.headings]

    def as_json(self) -> list[dict[str, object]]:
        """Return the rows with plain values by key."""
        keyed = [column for column in self.columns if column.key]
        rows = [{column.key: _plain(column.value(row)) for column in keyed} for row in self.rows]
        return [{key: value for key, value in row.items() if value is not ABSENT} for row in rows]

    def as_csv(self) -> list[dict[str, object]]:
        """Return the rows with a cell for every name that some row has a value for."""
        rows = [dict(pair for column in self.columns for pair in _cells(column, row)) for row in self.rows]
        names = [name for column in self.columns for name in column.csv]
        known = [name for name in dict.fromkeys(names) if any(name in row for row in rows)]
        return [{name: row.get(name, "") for name in known} for row in rows]

    def write_csv(self, path: Path) -> None:
        """Write the rows, whole or not at all. Raise `UserError` if the disk refuses."""
        write_csv(path, self.as_csv())

    def print(self) -> None:
        """Print the rows, without lines between columns."""
        print_table(self.headings, [self.texts(row) for row in self.rows])

    def markdown(self) -> str:
        return markdown(self.headings, [self.texts(row) for row in self.rows])

    def latex(self) -> str:
        return latex(self.headings, [self.texts(row) for row in self.rows])


class Console(console.Console):
    """Rich's console, which leaves it to the caller what happens when nobody reads the output any more."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns side by side, without lines between them."""
    table = RichTable(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False, width=None if sys.stdout.isatty() else WIDE).print(table)


def print_json(content: object) -> None:
    print(json.dumps(content, indent=2))


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for GitHub."""
    lines = [columns, ["---"] * len(columns), *rows]
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


#: What LaTeX reads as commands, and how it is written instead.
LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "→": r"$\rightarrow$", "±": r"$\pm$", "×": r"$\times$", "≠": r"$\neq$", "—": "---",
}  # fmt: skip


def latex(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a `tabular` with the lines of booktabs: words to the left, numbers to the right."""
    lines = [" & ".join("".join(LATEX.get(char, char) for char in cell) for cell in line) for line in [columns, *rows]]
    head, *body = (f"  {line} \\\\" for line in lines)
    begin = f"\\begin{{tabular}}{{l{'r' * (len(columns) - 1)}}}"
    rules_and_rows = [r"  \toprule", head, r"  \midrule", *body, r"  \bottomrule"]
    return "\n".join([begin, *rules_and_rows, r"\end{tabular}", ""])


def show_count(value: int) -> str:
    return f"{value:,}"


def show_flops(value: float) -> str:
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P"))


def show_bytes(value: float) -> str:
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _plain(value: object) -> object:
    """Return a value for JSON: the fields of a dataclass as an object."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _text(column: Column[R], row: R) -> str:
    value = column.value(row)
    return NOTHING if value is None or value is ABSENT else column.text(value)


def _cells(column: Column[R], row: R) -> list[tuple[str, object]]:
    value = column.value(row) if column.csv else ABSENT
    if value is ABSENT:
        return []
    if value is None:
        return [(name, "") for name in column.csv]
    cells = column.cells(value)
    return list(zip(column.csv, cells if isinstance(cells, tuple) else (cells,), strict=True))


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    step = 0
    while value >= base and step + 1 < len(units):
        value, step = value / base, step + 1
    return f"{value:.4g} {units[step]}".strip()
