"""The papers' analyses, for any model and task. Each has one file; run it with `vlmzip study NAME`.

The first line of a file's docstring says what the analysis measures. A file has three
functions, and `TITLE`, which says what the figure shows:

    measure(subject: Subject) -> list[Row]                      the rows of the CSV file
    draw(rows: Sequence[Row], title: str) -> Figure             the figure, drawn from the rows alone
    findings(rows: Sequence[Row]) -> list[str]                  a few sentences about the rows, with numbers

`measure` raises `Unsuited` if the analysis does not apply to the task or the model; `vlmzip study all` then skips it.
Any other error ends the command.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from vlmzip import outline
from vlmzip.errors import UserError, closest

#: The names of the analyses, which are the files of this folder.
NAMES = ("ablation", "attention_by_depth", "context", "encoder_attention", "layer_stride", "tau", "turns")


def find(name: str) -> ModuleType:
    """Return the module of an analysis. Raise `UserError` with the closest name if there is no such analysis."""
    if name not in NAMES:
        raise UserError(f"unknown analysis {name!r}{closest(name, (*NAMES, 'all'))}")
    return import_module(f"{__name__}.{name}")


def about(name: str) -> str:
    """Return a line that says what an analysis measures."""
    return outline.summary(__name__, name)
