"""Which methods there are, and how a name or a set of fields becomes one of them."""

from __future__ import annotations

import importlib
import inspect
from importlib.metadata import entry_points
from typing import Any

from vlmzip import methods
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, closest

ENTRY_POINTS = "vlmzip.methods"


def available() -> dict[str, type[Compressor]]:
    """Every method by name: those of `vlmzip.methods`, and those that installed packages offer as entry points."""
    found = {cls.name(): cls for cls in vars(methods).values() if _is_method(cls)}
    for entry in entry_points(group=ENTRY_POINTS):
        found.setdefault(entry.name, entry.load())
    return dict(sorted(found.items()))


def find(name: str) -> type[Compressor]:
    """The method called `name`, or the class at `package.module:Class`. Raises `UserError` if there is none."""
    if ":" in name:
        return _import(name)
    known = available()
    if name not in known:
        raise UserError(f"there is no method {name!r}{closest(name, known)}")
    return known[name]


def make(cls: type[Compressor], settings: dict[str, Any]) -> Compressor:
    """`cls(**settings)`, with unknown fields named. Raises `UserError`."""
    for name in settings:
        if name not in cls.field_names():
            raise UserError(f"{cls.name()} has no field {name!r}{closest(name, cls.field_names())}")
    return cls(**settings)


def _import(path: str) -> type[Compressor]:
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"cannot import the method {path!r}: {error}") from error
    if not _is_method(found):
        raise UserError(f"{path!r} is no method: a method is a subclass of vlmzip.Compressor that has assign()")
    return found


def _is_method(thing: object) -> bool:
    return inspect.isclass(thing) and issubclass(thing, Compressor) and not inspect.isabstract(thing)
