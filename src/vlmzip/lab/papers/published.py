"""Read the CSV files of published numbers."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass, fields
from importlib import resources

from vlmzip.errors import UserError, closest

#: How certain a number is, with the meaning of each word.
CERTAINTIES = {
    "as printed": "recorded from the paper itself",
    "authors' code": "recorded from the code that the authors published",
    "second-hand": "the paper's number, read in another publication or in notes about it",
    "measured by others": "somebody else's run of the method",
    "unconfirmed": "the source contradicts itself, or does not say what the number is",
}
#: Other names of papers.
ALIASES = {"dfmr": "llava-zip", "pdrop": "pyramiddrop", "cenprune": "cen-prune"}
UNCOMPRESSED = "no_compression"


@dataclass(frozen=True)
class Published:
    """A published number: a row of a CSV file, whose columns are these fields up to `note`."""

    paper: str
    """The paper that printed the number, or, for a number from another source, the paper of its method."""
    table: str
    """The number of the paper's table, or its topic if the number is unknown."""
    model: str
    method: str
    """The method's name in this library, or its usual name if the library does not have it."""
    setting: str
    """The settings that distinguish the row: `layer=2; stride=8; retrained`."""
    keep: str
    """Visual tokens per image (or video), averaged over the LLM's layers, or a percentage of them, such as `70%`.
    FastV and SparseVLM: as their authors count. Empty if unknown."""
    benchmark: str
    """The benchmark, or `average of 11` with the number of benchmarks. Empty for numbers without a benchmark."""
    metric: str
    """`score` is a benchmark's main number; `relative score` is the mean of the scores relative to no compression."""
    value: float
    unit: str
    source: str
    """The place in the paper, and the source in which it was read if that was not the paper."""
    certainty: str
    """One of `CERTAINTIES`."""
    note: str
    decimals: int
    """The number of decimals that the source prints."""

    @property
    def settings(self) -> dict[str, str]:
        """Return the parts of `setting` that have a value: `{"layer": "2", "stride": "8"}`."""
        parts = (part.partition("=") for part in self.setting.split("; "))
        return {name: value for name, equals, value in parts if equals}

    @property
    def half_unit(self) -> float:
        """Return the largest rounding error of the number."""
        return 0.5 * 10**-self.decimals

    @property
    def compressed(self) -> bool:
        return self.method != UNCOMPRESSED


def papers() -> list[str]:
    """Return the names of the papers with published numbers here."""
    return sorted({row.paper for rows in tables().values() for row in rows})


def published(paper: str) -> list[Published]:
    """Return a paper's numbers, file by file.

    Raise `UserError` with the closest name if there are none.
    """
    name = paper.strip().lower()
    name = ALIASES.get(name, name)
    numbers = [row for rows in tables().values() for row in rows if row.paper == name]
    if not numbers:
        raise UserError(f"vlmzip has no published numbers of {paper!r}{closest(name, papers())}")
    return numbers


@functools.cache
def tables() -> dict[str, tuple[Published, ...]]:
    """Return the rows of every file, by file name."""
    files = sorted(resources.files(__package__).iterdir(), key=lambda file: file.name)
    return {file.name: read(file.read_text(encoding="utf-8")) for file in files if file.name.endswith(".csv")}


def read(text: str) -> tuple[Published, ...]:
    """Parse the rows of one file. Raise `ValueError` for a missing column or cell, or a value that is not a number."""
    names = [field.name for field in fields(Published)][:-1]  # `decimals` follows from the value
    reader = csv.DictReader(text.splitlines(), strict=True)
    if reader.fieldnames != names:
        raise ValueError(f"columns must be {names}, got {reader.fieldnames}")
    return tuple(_row(row) for row in reader)


def _row(row: dict[str, str]) -> Published:
    if None in row or None in row.values():  # `csv` uses None for surplus cells (key) and missing cells (value)
        raise ValueError(f"the number of cells differs from the number of columns: {row}")
    number = row.pop("value")
    return Published(**row, value=float(number), decimals=len(number.partition(".")[2]))
