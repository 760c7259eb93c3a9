"""Reads the CSV files of published numbers."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass, fields
from importlib import resources

from vlmzip.errors import UserError, closest

#: How sure a number is.
CERTAINTIES = {
    "as printed": "recorded from the paper itself",
    "authors' code": "recorded from the code that the authors published",
    "second-hand": "the paper's number, read in another publication or in notes about it",
    "measured by others": "somebody else's run of the method",
    "unconfirmed": "the source contradicts itself, or does not say what the number is",
}
#: Other names under which papers are asked for.
ALIASES = {"dfmr": "llava-zip", "pdrop": "pyramiddrop", "cenprune": "cen-prune"}
UNCOMPRESSED = "no_compression"


@dataclass(frozen=True)
class Published:
    """One published number: a row of a CSV file, whose columns are these fields up to `note`."""

    paper: str
    """The paper that printed it; for a number from elsewhere, the paper whose method it is about."""
    table: str
    """The paper's table; where its number is not known, what the table is about."""
    model: str
    method: str
    """The method's name in this library, and its usual one where the library does not have it."""
    setting: str
    """What sets the row apart: `layer=2; stride=8; retrained`."""
    keep: str
    """Visual tokens of one image (or video) on average over the LLM's layers, or a share of them, such as `70%`.
    FastV and SparseVLM: as their authors count. Empty where it is not known."""
    benchmark: str
    """Empty for what belongs to no benchmark. `average of 11` says over how many."""
    metric: str
    """`score` is a benchmark's main number; `relative score` is the mean of the shares of the uncompressed scores."""
    value: float
    unit: str
    source: str
    """The place in the paper, and where it was read if that was not the paper."""
    certainty: str
    """One of `CERTAINTIES`."""
    note: str
    decimals: int
    """How many the source prints."""

    @property
    def settings(self) -> dict[str, str]:
        """The parts of `setting` that have a value: `{"layer": "2", "stride": "8"}`."""
        parts = (part.partition("=") for part in self.setting.split("; "))
        return {name: value for name, equals, value in parts if equals}

    @property
    def half_unit(self) -> float:
        """How far a number may lie from what was rounded to it."""
        return 0.5 * 10**-self.decimals

    @property
    def compressed(self) -> bool:
        return self.method != UNCOMPRESSED


def papers() -> list[str]:
    """The papers of which numbers are here."""
    return sorted({row.paper for rows in tables().values() for row in rows})


def published(paper: str) -> list[Published]:
    """A paper's numbers, file by file.

    Raises `UserError` with the closest name if there are none of that paper.
    """
    name = paper.strip().lower()
    name = ALIASES.get(name, name)
    found = [row for rows in tables().values() for row in rows if row.paper == name]
    if not found:
        raise UserError(f"no published numbers of {paper!r} are here{closest(name, papers())}")
    return found


@functools.cache
def tables() -> dict[str, tuple[Published, ...]]:
    """The rows of every file, by the file's name."""
    files = sorted(resources.files(__package__).iterdir(), key=lambda file: file.name)
    return {file.name: read(file.read_text(encoding="utf-8")) for file in files if file.name.endswith(".csv")}


def read(text: str) -> tuple[Published, ...]:
    """The rows of one file. Raises `ValueError` if a column or a cell is missing, or a value is no number."""
    names = [field.name for field in fields(Published)][:-1]  # `decimals` follows from the value
    reader = csv.DictReader(text.splitlines(), strict=True)
    if reader.fieldnames != names:
        raise ValueError(f"columns {reader.fieldnames}, not {names}")
    return tuple(_row(row) for row in reader)


def _row(row: dict[str, str]) -> Published:
    if None in row or None in row.values():  # what `csv` does with cells too many or too few
        raise ValueError(f"a row has not as many cells as there are columns: {row}")
    number = row.pop("value")
    return Published(**row, value=float(number), decimals=len(number.partition(".")[2]))
