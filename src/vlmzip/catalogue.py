"""Which methods there are, and how a name or a set of fields becomes one of them."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import enum
import importlib
import inspect
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from vlmzip import methods, own_files
from vlmzip.compressor import Compressor, check_choice
from vlmzip.errors import UserError, closest
from vlmzip.outline import ENTRY_POINTS
from vlmzip.visual_tokens import Site

REQUIRED = "required"


def available() -> dict[str, type[Compressor]]:
    """Every method by name: those of `vlmzip.methods`, and those that installed packages offer as entry points."""
    found = {cls.name(): cls for cls in vars(methods).values() if _is_method(cls)}
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            found.setdefault(entry.name, entry.load())
        except Exception as error:  # one broken package must not take the others along
            warnings.warn(f"the method {entry.name!r} of an installed package cannot be loaded: {error}", stacklevel=2)
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
    for field in dataclasses.fields(cls):
        if field.name not in settings and _default(field) == REQUIRED:
            raise UserError(f"{cls.name()} needs a value for its field {field.name!r}")
    return cls(**{name: read_field(name, value, hints[name]) for name, value in settings.items()})


def from_dict(content: Mapping[str, Any], find: Callable[[str], type[Compressor]] = find) -> Compressor:
    """The compressor that `Compressor.to_dict` described; `find` turns the methods' names into classes."""
    settings = dict(content)
    cls = find(str(settings.pop("method")))
    if "compressors" in settings:  # a chain holds others
        parts = settings["compressors"]
        if not isinstance(parts, list) or not all(isinstance(part, dict) and "method" in part for part in parts):
            raise UserError("compressors must be a list of objects, each with its method and the fields of it")
        settings["compressors"] = tuple(from_dict(part, find) for part in parts)
    return make(cls, settings)


def read_field(name: str, value: Any, hint: Any) -> Any:
    """A value for a field of type `hint`: text is read as a number, truth value or enum member where the type asks."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if not isinstance(value, str):
        if not any(_fits(value, kind) for kind in kinds):
            raise UserError(f"{name}={value!r} cannot be read as {_expected(kinds)}")
        return tuple(value) if isinstance(value, list) and any(get_origin(kind) is tuple for kind in kinds) else value
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
        if get_origin(kind) is tuple:
            return tuple(read_field(name, part.strip(), get_args(kind)[0]) for part in value.split(","))
        if kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(value)
    if str in kinds:
        return value
    raise UserError(f"{name}={value!r} cannot be read as {_expected(kinds)}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value other than text is of a type; what is not known of a type is left to the method."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:  # JSON has lists
        inner = get_args(get_args(kind)[0]) or get_args(kind)[:1]
        return isinstance(value, list | tuple) and all(any(_fits(one, of) for of in inner) for one in value)
    if not inspect.isclass(kind):
        return True
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def _expected(kinds: Sequence[Any]) -> str:
    named = [
        "|".join(map(str, get_args(kind))) if get_origin(kind) is Literal else getattr(kind, "__name__", str(kind))
        for kind in kinds
        if kind is not NoneType
    ]
    return " or ".join(named)


@dataclass(frozen=True)
class FieldDescription:
    """One field of a method, for help texts and tables."""

    name: str
    type: str
    default: Any
    doc: str


def describe(cls: type[Compressor]) -> list[FieldDescription]:
    """The fields of a method, its own before the shared ones, each with the string written below it."""
    docs: dict[str, str] = {}
    own: list[str] = []
    for owner in cls.__mro__[::-1]:
        if issubclass(owner, Compressor):
            own = _documented_fields(owner, docs)
    shared = [name for name in cls.field_names() if name not in own]
    by_name = {field.name: field for field in dataclasses.fields(cls)}
    return [
        FieldDescription(name, _type(by_name[name], cls), _default(by_name[name]), docs.get(name, ""))
        for name in [*(n for n in own if n in by_name), *shared]
    ]


def _type(field: dataclasses.Field, cls: type[Compressor]) -> str:
    hint = get_type_hints(cls)[field.name]
    if hint is Site:
        return " | ".join(cls.sites)
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    # A file without `from __future__ import annotations` has types, others have their names.
    return field.type.__name__ if isinstance(field.type, type) else str(field.type)


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    if field.default is dataclasses.MISSING:
        return REQUIRED
    value = field.default
    return round(value, 4) if isinstance(value, float) else str(value) if isinstance(value, enum.Enum) else value


def _documented_fields(owner: type, docs: dict[str, str]) -> list[str]:
    """Adds the strings below `owner`'s fields to `docs`; returns the names of the fields it declares."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    except (OSError, TypeError, SyntaxError):  # a class without source, made in a console
        return []
    declared: list[str] = []
    for statement in getattr(body, "body", []):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            declared.append(statement.target.id)
        elif declared and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            docs[declared[-1]] = " ".join(str(statement.value.value).split())
    return declared


def _import(path: str) -> type[Compressor]:
    module, _, attribute = path.partition(":")
    if module.endswith(".py"):
        raise UserError(f"{path!r} names a file; give the module: {module.removesuffix('.py')}:{attribute}")
    own_files.search_for(module)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever somebody's module does while it is imported
        raise UserError(f"cannot import the method {path!r}: {type(error).__name__}: {error}") from error
    if not _is_method(found):
        raise UserError(f"{path!r} is no method: a method is a subclass of vlmzip.Compressor that has assign()")
    return found


def _is_method(thing: object) -> bool:
    return inspect.isclass(thing) and issubclass(thing, Compressor) and not inspect.isabstract(thing)
