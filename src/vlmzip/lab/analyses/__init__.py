"""The papers' analyses, on any model and task: one file each, `vlmzip study NAME`.

A file has a docstring whose first line says what it finds out, and three functions:

    measure(subject: Subject) -> list[Row]                      what is written as CSV
    draw(rows: Sequence[Row], title: str) -> Figure             what is written as PNG and SVG; reads the rows alone
    findings(rows: Sequence[Row]) -> list[str]                  the rows in a few sentences, with their figures

`measure` raises `Unsuited` where the task or the model does not suit the analysis, and `vlmzip study all` goes on
without it. Any other error ends the command.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from vlmzip import outline
from vlmzip.errors import UserError, closest

#: The files of this folder.
NAMES = ("ablation", "attention_by_depth", "context", "encoder_attention", "layer_stride", "tau", "turns")


def find(name: str) -> ModuleType:
    """The analysis of that name. Raises `UserError` with the closest one where there is none."""
    if name not in NAMES:
        raise UserError(f"there is no analysis {name!r}{closest(name, (*NAMES, 'all'))}")
    return import_module(f"{__name__}.{name}")


def about(name: str) -> str:
    """What an analysis finds out, in a line."""
    return outline.summary(__name__, name)
