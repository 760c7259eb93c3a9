"""Plain tables for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table

from vlmzip.cli.console import Console

#: Characters of a line that nobody's screen limits: what reads it may.
WIDE = 240


def print_table(columns: list[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns side by side, without lines between them."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False, width=None if sys.stdout.isatty() else WIDE).print(table)


def show_count(value: int) -> str:
    return f"{value:,}"


def show_flops(value: float) -> str:
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P"))


def show_bytes(value: float) -> str:
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    step = 0
    while value >= base and step + 1 < len(units):
        value, step = value / base, step + 1
    return f"{value:.4g} {units[step]}".strip()
