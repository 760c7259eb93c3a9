"""One schema for every dataclass of settings: the methods, a training run and its parts.

The fields of a frozen dataclass are, written once, the constructor's arguments, the options of the command line and the
keys of YAML and JSON. pydantic checks their values by type and range; the string below a field is its documentation.

    queries: Annotated[int, Ge(1)] = 32
    \"\"\"Tokens per image.\"\"\"

Text is read by the field's type: "3" as a number, "1,3" as a tuple, "none" as None, a name as the member of an enum.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import enum
import inspect
import numbers
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints
from weakref import WeakKeyDictionary

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError

from vlmzip.errors import UserError, alternatives, closest, did_you_mean
from vlmzip.outline import field_docs, with_docs

T = TypeVar("T")

#: A count that becomes memory, steps or processes: no run needs more.
Count = Annotated[int, Ge(1), Le(10**9)]
#: What `torch.Generator.manual_seed` takes.
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]

_HINTS: WeakKeyDictionary[type, dict[str, Any]] = WeakKeyDictionary()
#: How a field without a default is described.
REQUIRED = "required"
#: A boolean is not a number, 2.0 is not a whole number, and no setting is NaN or infinite.
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
#: Types in words, one value and several.
_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "truth values"),
    str: ("text", "texts"),
}


# ---------------------------------------------------------------- reading


def read(cls: type[T], content: Any, where: str = "", *, what: str = "") -> T:
    """Make a dataclass from the settings that a command line, YAML or JSON has.

    `where` is the key that holds the settings, such as "lora"; `what` names them in messages. Raises `UserError`, in
    one line, for an unknown key, a missing one, or a value that does not fit.
    """
    what = what or where or "the file"
    if not isinstance(content, Mapping):
        raise UserError(f"{what} must be a mapping of settings such as {_example(cls)}, got {content!r}")
    hints = hints_of(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in content:
        if key not in fields:
            raise UserError(f"{what}: there is no {key!r}{closest(str(key), fields)}")
    prefix = f"{where}." if where else ""
    for name, field in fields.items():
        if name not in content and default_of(field) == REQUIRED:
            raise UserError(f"{prefix}{name} is missing")
    return cls(**{name: read_value(prefix + name, value, hints[name]) for name, value in content.items()})


def check(settings: Any) -> None:
    """Check every field of a frozen dataclass that is being made, and set it to the value that its type reads.

    `__post_init__` calls this. Raises `UserError` for a value that does not fit.
    """
    for name, hint in hints_of(type(settings)).items():
        given = getattr(settings, name)
        value = read_value(name, given, hint)
        if value is not given:
            object.__setattr__(settings, name, value)


def read_value(name: str, value: Any, hint: Any) -> Any:
    """Return a value as a field of type `hint` holds it.

    Raises `UserError`, which begins with `name`, for a value that does not fit.
    """
    nested = _dataclass_in(hint)
    if nested is not None and (value is True or isinstance(value, Mapping)):
        return read(nested, {} if value is True else value, name)
    if nested is not None and value is not None and not isinstance(value, nested):
        raise UserError(f"{name} must be a mapping of settings such as {_example(nested)}, got {value!r}")
    try:
        return _validated(_converted(value, hint), hint)
    except ValidationError as error:
        raise _refusal(name, value, hint, error) from None


def _converted(value: Any, hint: Any) -> Any:
    """Return text, a list or another library's number as the type asks; any other value as it is."""
    if isinstance(value, str) and not isinstance(value, enum.Enum):
        return _from_text(value, hint)
    kinds = set(map(_base, _arms(hint)))
    if isinstance(value, list) and any(get_origin(kind) is tuple for kind in kinds):
        return tuple(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = int(value) if isinstance(value, numbers.Integral) else float(value)
        # YAML and JSON have numbers where a name or a share such as 0.25 is meant.
        return str(value) if kinds & {str} and not kinds & {int, float} else number
    return value


def _from_text(text: str, hint: Any) -> Any:
    """Return text as the first type of a union that can be read from it; text that none can be read from, as it is."""
    arms = _arms(hint)
    if text.lower() == "none" and NoneType in arms and str not in arms:
        return None
    for kind in (kind for arm in arms for kind in _arms(_base(arm))):
        kind = _base(kind)
        if inspect.isclass(kind) and issubclass(kind, enum.Enum):
            with contextlib.suppress(ValueError):
                return kind(text)
        if kind is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if get_origin(kind) is tuple:
            return tuple(_from_text(part.strip(), get_args(kind)[0]) for part in text.split(","))
        if kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
    return text


def _validated(value: Any, hint: Any) -> Any:
    return _adapter(hint).validate_python(value)


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=_STRICT)


def _refusal(name: str, value: Any, hint: Any, error: ValidationError) -> UserError:
    """Return the one line for a value that does not fit."""
    for problem in error.errors(include_url=False):
        said = problem.get("ctx", {}).get("error")
        if isinstance(said, UserError):  # the type has a check that says better what is wrong
            return said
    choices = [choice for arm in _arms(_element(hint)) for choice in _choices(arm)]
    parts = value if isinstance(value, tuple | list) else [value]
    wrong = [part for part in parts if choices and isinstance(part, str) and part not in choices]
    near = did_you_mean(wrong[0], choices) if wrong else ""
    return UserError(f"{name} must be {in_words(hint)}, got {value!r}{near}")


# ---------------------------------------------------------------- types


def hints_of(cls: type) -> dict[str, Any]:
    """Return the type of each field that the constructor takes, with ranges."""
    if cls not in _HINTS:
        hints = get_type_hints(cls, include_extras=True)
        _HINTS[cls] = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    return _HINTS[cls]


def _arms(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union; a type alone is the only one."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _base(hint: Any) -> Any:
    """Return a type without its ranges."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _element(hint: Any) -> Any:
    """Return the type of a tuple's elements; another type as it is."""
    base = _base(hint)
    return get_args(base)[0] if get_origin(base) is tuple else hint


def _dataclass_in(hint: Any) -> type | None:
    """Return the dataclass of settings that a field holds, if it holds one."""
    kinds = [kind for kind in map(_base, _arms(hint)) if dataclasses.is_dataclass(kind)]
    return kinds[0] if kinds and isinstance(kinds[0], type) else None


def _choices(kind: Any) -> list[str]:
    base = _base(kind)
    if get_origin(base) is Literal:
        return list(map(str, get_args(base)))
    return list(map(str, base)) if inspect.isclass(base) and issubclass(base, enum.Enum) else []


def in_words(hint: Any, *, several: bool = False) -> str:
    """Return what a value of a type can be, such as "a whole number of at least 1"."""
    arms = [arm for arm in _arms(hint) if arm is not NoneType]
    words = [
        "several, such as 1,3" if _element(arm) is not arm and _element(arm) in arms else _in_words(arm, several)
        for arm in arms
    ]
    return " or ".join(dict.fromkeys(words))


def _in_words(kind: Any, several: bool) -> str:
    base, marks = _base(kind), kind.__metadata__ if get_origin(kind) is Annotated else ()
    if named := [mark for mark in marks if isinstance(mark, str)]:  # the type says it in its own words
        return str(named[0])
    if get_origin(base) is tuple:
        example = "such as 1,3" if {int, float} & set(map(_base, _arms(_element(base)))) else "separated by commas"
        return f"{in_words(_element(base), several=True)}, {example}"
    if choices := _choices(base):
        return alternatives(choices)
    if base in _WORDS:
        return f"{_WORDS[base][several]}{_range_in_words(marks)}"
    return "a mapping" if get_origin(base) is not None else f"a {getattr(base, '__name__', base)}"


def _range_in_words(marks: tuple[Any, ...]) -> str:
    bounds = _bounds(marks)
    if bounds.keys() == {Ge, Le}:
        return f" from {bounds[Ge]} to {bounds[Le]}"
    words = {Ge: "of at least", Gt: "above", Le: "of at most", Lt: "below"}
    return "".join(f" {part}" for part in [" and ".join(f"{words[kind]} {bounds[kind]}" for kind in bounds)] if part)


def _bounds(marks: tuple[Any, ...]) -> dict[type, str]:
    """Return the ends of a range, the lower one first."""
    ends = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt"}
    return {kind: f"{getattr(mark, name):,}" for kind, name in ends.items() for mark in marks if isinstance(mark, kind)}


# ---------------------------------------------------------------- describing


@dataclasses.dataclass(frozen=True)
class FieldDescription:
    """One field of a dataclass of settings, for help texts and tables."""

    name: str
    """Fields of a part, such as `lora`, have their full names: "lora.r"."""
    type: str
    default: Any
    doc: str


def describe(cls: type) -> list[FieldDescription]:
    """Describe the fields of a dataclass, those of the class itself before those of its bases."""
    return list(_described(cls))


def _described(cls: type) -> Iterator[FieldDescription]:
    docs: dict[str, str] = {}
    own: list[str] = []
    for owner in cls.__mro__[::-1]:
        if dataclasses.is_dataclass(owner):
            declared = _docs_of(owner)
            docs, own = with_docs(docs, declared), list(declared)
    hints = hints_of(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in sorted(fields, key=lambda name: name not in own):
        yield FieldDescription(name, type_text(hints[name]), default_of(fields[name]), docs.get(name, ""))
        if (nested := _dataclass_in(hints[name])) is not None:
            for part in describe(nested):
                yield dataclasses.replace(part, name=f"{name}.{part.name}")


def _docs_of(owner: type) -> dict[str, str]:
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # a class without source, made in a console
        return {}
    return field_docs(definition)


def type_text(hint: Any) -> str:
    """Return a type in short, such as "int ≥ 1 | None" or "mean | max"."""
    return " | ".join(dict.fromkeys(_type_text(arm) for arm in _arms(hint)))


def _type_text(kind: Any) -> str:
    base, marks = _base(kind), kind.__metadata__ if get_origin(kind) is Annotated else ()
    if named := [mark for mark in marks if isinstance(mark, str)]:
        return str(named[0])
    if kind is NoneType:
        return "None"
    if choices := _choices(base):
        return " | ".join(choices)
    if get_origin(base) is tuple:
        return f"tuple[{type_text(get_args(base)[0])}, ...]"
    text = base.__name__ if isinstance(base, type) and not get_args(base) else str(base).replace("typing.", "")
    bounds = _bounds(marks)
    if bounds.keys() == {Ge, Le}:
        return f"{text} {bounds[Ge]} to {bounds[Le]}"
    signs = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}
    return " ".join([text, ", ".join(f"{signs[kind]} {bounds[kind]}" for kind in bounds)]).strip()


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return a field's default as help texts show it; `REQUIRED` if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    if field.default is dataclasses.MISSING:
        return REQUIRED
    value = field.default
    return float(f"{value:.4g}") if isinstance(value, float) else str(value) if isinstance(value, enum.Enum) else value


def _example(cls: type) -> str:
    """Return the settings that a dataclass needs, or its first one, as YAML has them."""
    described = [field for field in describe(cls) if "." not in field.name]
    needed = [field.name for field in described if field.default == REQUIRED] or [described[0].name]
    return "{" + ", ".join(f"{name}: …" for name in needed) + "}"
