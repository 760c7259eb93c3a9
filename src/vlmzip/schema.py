"""One schema for every dataclass of settings: the methods, a training run and its parts.

The fields of a frozen dataclass define the constructor's arguments, the command-line options and the keys of YAML and
JSON. pydantic checks values by type and range. The string below a field is its documentation.

    queries: Annotated[int, Ge(1)] = 32
    \"\"\"Tokens per image.\"\"\"

Text is converted to the field's type: "3" to a number, "1,3" to a tuple, "none" to None, a name to an enum's member.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import enum
import inspect
import numbers
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints
from weakref import WeakKeyDictionary

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, InstanceOf, TypeAdapter, ValidationError

from vlmzip.errors import UserError, alternatives, did_you_mean, refuse_unknown
from vlmzip.field_docs import field_docs, with_docs

T = TypeVar("T")

#: A count of things that cost memory, steps or processes. The upper limit is more than any run needs.
Count = Annotated[int, Ge(1), Le(10**9)]
#: A seed that `torch.Generator.manual_seed` accepts.
Seed = Annotated[int, Ge(0), Le(2**63 - 1)]

_TYPES: WeakKeyDictionary[type, dict[str, FieldType]] = WeakKeyDictionary()
#: The description of the default of a field without one.
REQUIRED = "required"
#: A boolean is not a number, 2.0 is not a whole number, and no setting is NaN or infinite.
_STRICT = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
#: Types of values that are checked without conversion first.
_AS_GIVEN = {int, float, bool, tuple, NoneType}
#: Types in words.
_WORDS: dict[object, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


# ---------------------------------------------------------------- reading


def read(cls: type[T], content: object, where: str = "") -> T:
    """Make a dataclass from settings of a command line, YAML or JSON.

    `where` is the key of the settings, such as "lora". Raise a one-line `UserError` for an unknown or missing key, or
    an invalid value.
    """
    what = where or "the file"
    if not isinstance(content, Mapping):
        raise UserError(f"{what} must be a mapping of settings such as {_example(cls)}, got {content!r}")
    types = types_of(cls)
    refuse_unknown(what, content, types)
    prefix = f"{where}." if where else ""
    for name in required(cls):
        if name not in content:
            raise UserError(f"{prefix}{name} is missing")
    return cls(**{name: read_value(prefix + name, value, types[name]) for name, value in content.items()})


def check(settings: object) -> None:
    """Check every field of a frozen dataclass during its construction, and convert it to the field's type.

    `__post_init__` calls this. Raise `UserError` for an invalid value.
    """
    for name, kind in types_of(type(settings)).items():
        value = getattr(settings, name)
        converted = read_value(name, value, kind)
        if converted is not value:
            object.__setattr__(settings, name, converted)


def read_value(name: str, value: object, kind: FieldType) -> object:
    """Return a value converted to a field's type.

    Raise `UserError`, with a message that starts with `name`, for an invalid value.
    """
    nested = kind.settings
    if nested is not None and (value is True or isinstance(value, Mapping)):
        return read(nested, {} if value is True else value, name)
    if nested is not None and value is not None and not isinstance(value, nested):
        raise UserError(f"{name} must be a mapping of settings such as {_example(nested)}, got {value!r}")
    try:
        if type(value) in _AS_GIVEN:  # the fast path: the search for a budget makes thousands of compressors
            with contextlib.suppress(ValidationError):
                return kind.adapter.validate_python(value)
        return kind.adapter.validate_python(_converted(value, kind.hint))
    except ValidationError as error:
        raise _refusal(name, value, kind.hint, error) from None


def _converted(value: object, hint: object) -> object:
    """Convert text, a list or another library's number to a type. Return other values unchanged."""
    if isinstance(value, str) and not isinstance(value, enum.Enum):
        return _from_text(value, hint)
    kinds = set(map(_base, _arms(hint)))
    if isinstance(value, list) and any(get_origin(kind) is tuple for kind in kinds):
        return tuple(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        number = int(value) if isinstance(value, numbers.Integral) else float(value)
        # In YAML and JSON, a text such as 0.25 is read as a number.
        return str(value) if kinds & {str} and not kinds & {int, float} else number
    return value


def _from_text(text: str, hint: object) -> object:
    """Convert text to the first type of a union that accepts it. Return it unchanged if no type does."""
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


def _refusal(name: str, value: object, hint: object, error: ValidationError) -> UserError:
    """Return the one-line error for an invalid value."""
    for problem in error.errors(include_url=False):
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, UserError):  # the type's own check has a better message
            return cause
    choices = [choice for arm in _arms(_element(hint)) for choice in _choices(arm)]
    parts = value if isinstance(value, tuple | list) else [value]
    wrong = [part for part in parts if choices and isinstance(part, str) and part not in choices]
    near = did_you_mean(wrong[0], choices) if wrong else ""
    return UserError(f"{name} must be {in_words(hint)}, got {value!r}{near}")


# ---------------------------------------------------------------- types


@dataclasses.dataclass(frozen=True, eq=False)
class FieldType:
    """The type of a field."""

    hint: object
    """The type as written, with its range."""
    adapter: TypeAdapter[object]
    """The adapter that checks values."""
    settings: type | None
    """The dataclass of the field's nested settings, if it has any."""


def types_of(cls: type) -> dict[str, FieldType]:
    """Return the type of each field of the constructor."""
    if cls not in _TYPES:
        hints = get_type_hints(cls, include_extras=True)
        hints = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
        _TYPES[cls] = {name: FieldType(hint, _adapter(hint), _settings_in(hint)) for name, hint in hints.items()}
    return _TYPES[cls]


def required(cls: type) -> list[str]:
    """Return the fields of the constructor that have no default."""
    fields = [field for field in dataclasses.fields(cls) if field.init]
    return [field.name for field in fields if field.default is field.default_factory is dataclasses.MISSING]


def _adapter(hint: Any) -> TypeAdapter[object]:
    if dataclasses.is_dataclass(hint):  # pydantic accepts no configuration for them; `read` checks their fields
        return TypeAdapter(InstanceOf[hint])
    return TypeAdapter(hint, config=_STRICT)


def _arms(hint: object) -> tuple[object, ...]:
    """Return the types of a union, or a single type as a tuple."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _base(hint: object) -> object:
    """Return a type without its range."""
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _element(hint: object) -> object:
    """Return the type of a tuple's elements, or another type unchanged."""
    base = _base(hint)
    return get_args(base)[0] if get_origin(base) is tuple else hint


def _settings_in(hint: object) -> type | None:
    """Return the dataclass of a field's nested settings, or `None`."""
    kinds = [kind for kind in map(_base, _arms(hint)) if isinstance(kind, type) and not inspect.isabstract(kind)]
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)


def _choices(kind: object) -> list[str]:
    base = _base(kind)
    if get_origin(base) is Literal:
        return list(map(str, get_args(base)))
    return list(map(str, base)) if inspect.isclass(base) and issubclass(base, enum.Enum) else []


def in_words(hint: object) -> str:
    """Describe the values of a type in words, such as "a whole number of at least 1"."""
    arms = [arm for arm in _arms(hint) if arm is not NoneType]
    lists = [arm for arm in arms if _element(arm) is not arm and _element(arm) in arms]
    words = ["several, such as 1,3" if arm in lists else _in_words(arm) for arm in arms]
    return " or ".join(dict.fromkeys(words))


def _in_words(kind: object) -> str:
    base, marks = _base(kind), get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    if named := [mark for mark in marks if isinstance(mark, str)]:  # the type has its own words
        return str(named[0])
    if get_origin(base) is tuple:
        return f"one or several, separated by commas: {in_words(_element(base))}"
    if choices := _choices(base):
        return alternatives(choices)
    if base in _WORDS:
        return _WORDS[base] + _range_in_words(marks)
    return "a mapping" if get_origin(base) is not None else f"a {getattr(base, '__name__', base)}"


def _range_in_words(marks: tuple[object, ...]) -> str:
    bounds = _bounds(marks)
    if bounds.keys() == {Ge, Le}:
        return f" from {bounds[Ge]} to {bounds[Le]}"
    words = {Ge: "of at least", Gt: "above", Le: "of at most", Lt: "below"}
    text = " and ".join(f"{words[kind]} {bound}" for kind, bound in bounds.items())
    return f" {text}" if text else ""


def _bounds(marks: tuple[object, ...]) -> dict[type, str]:
    """Return the bounds of a range, the lower one first."""
    ends = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt"}
    return {kind: f"{getattr(mark, name):,}" for kind, name in ends.items() for mark in marks if isinstance(mark, kind)}


# ---------------------------------------------------------------- describing


@dataclasses.dataclass(frozen=True)
class FieldDescription:
    """The description of a field, for help texts and tables."""

    name: str
    """The field's name. Nested fields have full names, such as "lora.r"."""
    type: str
    default: object
    doc: str


def describe(cls: type, docs_of: Callable[[type], dict[str, str]] | None = None) -> list[FieldDescription]:
    """Describe the fields of a dataclass: first its own, then those of its base classes.

    `docs_of` returns the documentation of the fields that a class declares; by default, it is read from the source.
    """
    return list(_described(cls, docs_of or _docs_of))


def with_choices(fields: list[FieldDescription], name: str, choices: Sequence[str]) -> list[FieldDescription]:
    """Return the descriptions, with `choices` as the only values of the field `name`."""
    words = alternatives(choices)
    return [dataclasses.replace(field, type=words) if field.name == name else field for field in fields]


def _described(cls: type, docs_of: Callable[[type], dict[str, str]]) -> Iterator[FieldDescription]:
    docs: dict[str, str] = {}
    last: list[str] = []  # the fields that the class itself declares
    for owner in cls.__mro__[::-1]:
        if dataclasses.is_dataclass(owner):
            declared = docs_of(owner)
            docs, last = with_docs(docs, declared), list(declared)
    types = types_of(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in sorted(fields, key=lambda name: name not in last):
        yield FieldDescription(name, in_words(types[name].hint), _default_of(fields[name]), docs.get(name, ""))
        if (nested := types[name].settings) is not None:
            for part in describe(nested, docs_of):
                yield dataclasses.replace(part, name=f"{name}.{part.name}")


def _docs_of(owner: type) -> dict[str, str]:
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    except (OSError, TypeError, SyntaxError, ValueError):  # a class without source, made in a console
        return {}
    return field_docs(definition)


def _default_of(field: dataclasses.Field[object]) -> object:
    """Return a field's default as help texts show it, or `REQUIRED`."""
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    if field.default is dataclasses.MISSING:
        return REQUIRED
    value = field.default
    return float(f"{value:.4g}") if isinstance(value, float) else str(value) if isinstance(value, enum.Enum) else value


def _example(cls: type) -> str:
    """Return an example in YAML of a dataclass's required settings, or of its first setting."""
    names = required(cls) or list(types_of(cls))[:1]
    return "{" + ", ".join(f"{name}: …" for name in names) + "}"
