"""Which methods there are, and how a name or a set of fields becomes one of them."""

from __future__ import annotations

import contextlib
import enum
import importlib
import inspect
from importlib.metadata import entry_points
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vlmzip import methods
from vlmzip.compressor import Compressor, check_choice
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
    """`cls(**settings)` for settings from the command line, YAML or JSON: text is read by the field's type.

    Raises `UserError` for unknown fields and unreadable values.
    """
    hints = get_type_hints(cls)
    for name in settings:
        if name not in cls.field_names():
            raise UserError(f"{cls.name()} has no field {name!r}{closest(name, cls.field_names())}")
    return cls(**{name: read_field(name, value, hints[name]) for name, value in settings.items()})


def read_field(name: str, value: Any, hint: Any) -> Any:
    """A value for a field of type `hint`; text becomes a number, a truth value or an enum member where the type asks."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if not isinstance(value, str) or str in kinds:
        return value
    if value.lower() == "none" and NoneType in kinds:
        return None
    for kind in kinds:
        if get_origin(kind) is Literal:
            check_choice(name, value, get_args(kind))
            return value
        if inspect.isclass(kind) and issubclass(kind, enum.Enum):
            check_choice(name, value, [str(member) for member in kind])
            return kind(value)
        if kind is bool and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    expected = " or ".join(kind.__name__ for kind in kinds if kind is not NoneType)
    raise UserError(f"{name}={value!r} cannot be read as {expected}")


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
