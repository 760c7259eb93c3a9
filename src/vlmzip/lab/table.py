"""Results as rows and columns, for people and for programs.

A command defines its columns once. A column has a heading and a format for people, a key for JSON, and one or several
names for CSV."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Generic, Literal, NoReturn, TypeVar

from rich import console
from rich.table import Table as RichTable
from rich.text import Text

from vlmzip.files import write_csv

R = TypeVar("R")
#: The type of a column's values.
V = TypeVar("V")


class Absent:
    """The class of `ABSENT`."""

    def __repr__(self) -> str:
        return "ABSENT"


#: Printed if a row has no value.
NOTHING = "—"
#: The value of a column that does not apply to a row: JSON omits the key, and the CSV cell is empty.
ABSENT = Absent()
#: Line width without a terminal.
WIDE = 240


@dataclass(frozen=True)
class Column(Generic[R]):
    """A column of a table. It gets a value from each row and formats it."""

    value: Callable[[R], object]
    heading: str = ""
    """The heading for people. Without one, the column is only in files."""
    text: Callable[[Any], str] = str
    """Format a value for people."""
    key: str = ""
    """The key in JSON. Without one, the column is not in JSON."""
    csv: tuple[str, ...] = ()
    """The names in CSV. For several names, `cells` returns as many values."""
    cells: Callable[[Any], object] = lambda value: value
    """Return the CSV value, or a tuple of values."""
    align: Literal["left", "right"] = "left"
    """The alignment in print."""
    wraps: bool = True
    """Whether a long value may continue in the next line of its cell."""


@dataclass(frozen=True)
class Table(Generic[R]):
    """A table: columns and rows."""

    columns: Sequence[Column[R]]
    rows: Sequence[R]
    shown: Sequence[str] | None = None
    """The headings to print, in order; `None`: all, in the order of the columns."""

    @property
    def headings(self) -> list[str]:
        return [column.heading for column in self.columns if column.heading] if self.shown is None else [*self.shown]

    def texts(self, row: R) -> list[str]:
        """Return a row for people, a text for each heading."""
        return [_text(column, row) for column in self._shown()]

    def as_json(self) -> list[dict[str, object]]:
        """Return the rows with plain values by key."""
        keyed = [column for column in self.columns if column.key]
        rows = [{column.key: _plain(column.value(row)) for column in keyed} for row in self.rows]
        return [{key: value for key, value in row.items() if value is not ABSENT} for row in rows]

    def as_csv(self) -> list[dict[str, object]]:
        """Return the rows as CSV cells, with every name for which some row has a value."""
        rows = [dict(pair for column in self.columns for pair in _cells(column, row)) for row in self.rows]
        names = [name for column in self.columns for name in column.csv]
        known = [name for name in dict.fromkeys(names) if any(name in row for row in rows)]
        return [{name: row.get(name, "") for name in known} for row in rows]

    def write_csv(self, path: Path) -> None:
        """Write the rows, whole or not at all. Raise `UserError` if the disk refuses."""
        write_csv(path, self.as_csv())

    def rich(self) -> RichTable:
        """Return a table for a rich console, without lines between columns."""
        return _rich(self._shown(), map(self.texts, self.rows))

    def print(self) -> None:
        """Print the rows, without lines between columns."""
        _print(self.rich())

    def text(self) -> str:
        """Return what `print` prints without a terminal."""
        file = io.StringIO()
        Console(file=file, width=WIDE).print(self.rich())
        return "".join(f"{line.rstrip()}\n" for line in file.getvalue().splitlines())

    def markdown(self) -> str:
        return markdown(self.headings, [self.texts(row) for row in self.rows])

    def latex(self) -> str:
        return latex(self.headings, [self.texts(row) for row in self.rows])

    def _shown(self) -> list[Column[R]]:
        by_heading = {column.heading: column for column in self.columns}
        return [by_heading[heading] for heading in self.headings]


def table_of(rows: Sequence[Mapping[str, object]], conditions: Mapping[str, object]) -> Table[Mapping[str, object]]:
    """Return dictionaries with equal keys as a table for JSON and CSV. `conditions` are further columns in CSV."""
    values: list[Column[Mapping[str, object]]] = [Column(itemgetter(name), key=name, csv=(name,)) for name in rows[0]]
    return Table([*values, *(same(name, value) for name, value in conditions.items())], rows)


def same(name: str, value: object, key: str = "") -> Column[R]:
    """Return a column in CSV, and in JSON if there is a `key`, whose value is the same in every row."""
    return Column(lambda row: value, key=key, csv=(name,))


class Console(console.Console):
    """A rich console that raises `BrokenPipeError` when the reader closes the pipe. The caller handles the error."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print columns side by side, without lines between them."""
    _print(_rich([Column(str, heading) for heading in headings], rows))


def _rich(columns: Sequence[Column[R]], rows: Iterable[Sequence[str]]) -> RichTable:
    table = RichTable(box=None, pad_edge=False)
    for column in columns:
        overflow: Literal["fold", "ellipsis"] = "fold" if column.wraps else "ellipsis"
        table.add_column(Text(column.heading), justify=column.align, overflow=overflow, no_wrap=not column.wraps)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _print(table: RichTable) -> None:
    Console(highlight=False, width=None if sys.stdout.isatty() else WIDE).print(table)


def print_json(content: object) -> None:
    print(json.dumps(content, indent=2))


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for GitHub."""
    lines = [columns, ["---"] * len(columns), *rows]
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


#: Characters that are special in LaTeX, and their replacements.
LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "→": r"$\rightarrow$", "±": r"$\pm$", "×": r"$\times$", "≠": r"$\neq$", "—": "---",
}  # fmt: skip


def latex(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a `tabular` with booktabs rules: words on the left, numbers on the right."""
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
    """Return a value for JSON. A dataclass becomes an object."""
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
