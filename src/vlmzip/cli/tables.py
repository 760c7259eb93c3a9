"""Plain tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_table(columns: list[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns side by side, without lines between them."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False).print(table)
