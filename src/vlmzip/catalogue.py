"""The catalogue of methods: list them, find one by name, and make one from settings."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable, Collection, Mapping
from importlib.metadata import entry_points
from typing import Any, TypeGuard

from vlmzip import methods, own_files, schema
from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, check_choice, closest
from vlmzip.own_files import ENTRY_POINTS
from vlmzip.sites import KINDS, Filters, Kind, Signal, Site


def available(
    *,
    kind: Kind | None = None,
    site: Site | str | None = None,
    text_aware: bool | None = None,
    trained_weights: bool | None = None,
    videos_only: bool | None = None,
    without: Signal | str | Collection[Signal | str] = (),
) -> dict[str, type[Compressor]]:
    """Return all methods by name: those of `vlmzip.methods`, and the entry points of installed packages.

    Filters leave only the methods of a kind, those that can act at a site, those that read the question (or do not),
    and so on. `without` has signals that your model does not give, or a single one: methods that need one of them are
    left out. Raise `UserError` for an unknown kind, site or signal, and for a filter that must be true or false.

        vlmzip.available(kind="prune", site="pre_projector", text_aware=False, without=["cls_attention"])
    """
    if kind is not None:
        check_choice("kind", kind, KINDS)
    if site is not None:
        check_choice("site", site, Site)
    signals = {without} if isinstance(without, str) else set(without)
    for signal in signals:
        check_choice("signal", signal, Signal)
    for filter_name, value in (
        ("text_aware", text_aware), ("trained_weights", trained_weights), ("videos_only", videos_only)
    ):  # fmt: skip
        if value is not None and not isinstance(value, bool):
            raise UserError(f"{filter_name} must be True, False or None, got {value!r}")
    filters = Filters(kind, site, text_aware, trained_weights, videos_only, signals)
    return {name: cls for name, cls in _all().items() if filters.allow(cls)}


def _all() -> dict[str, type[Compressor]]:
    """Return all methods by name."""
    classes = _shipped()
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            classes.setdefault(entry.name, entry.load())
        except Exception as error:  # a broken package must not hide the other methods
            warnings.warn(f"the method {entry.name!r} of an installed package cannot be loaded: {error}", stacklevel=2)
    return dict(sorted(classes.items()))


def _shipped() -> dict[str, type[Compressor]]:
    """Return the methods of `vlmzip.methods` by name."""
    return {cls.name(): cls for cls in vars(methods).values() if _is_method(cls)}


def find(name: str) -> type[Compressor]:
    """Return the method called `name`, or the class `package.module:Class`. Raise `UserError` if there is none."""
    if ":" in name:
        return _import(name)
    known = _shipped()
    if name not in known:
        known = _all()  # slower: it looks through all installed packages
    if name not in known:
        raise UserError(f"unknown method {name!r}{closest(name, known)}")
    return known[name]


def make(cls: type[Compressor], settings: Mapping[str, object]) -> Compressor:
    """Make a method from settings of the command line, YAML or JSON. Text is converted to the field's type.

    Raise `UserError` for unknown fields, missing fields and invalid values.
    """
    for name in settings:
        if name not in cls.field_names():
            raise UserError(f"{cls.name()} has no field {name!r}{closest(name, cls.field_names())}")
    for name in schema.required(cls):
        if name not in settings:
            raise UserError(f"{cls.name()} needs a value for its field {name!r}")
    if "site" in settings:
        check_choice("site", settings["site"], cls.sites)
    types = schema.types_of(cls)
    values: dict[str, Any] = {name: schema.read_value(name, value, types[name]) for name, value in settings.items()}
    return cls(**values)


def from_dict(content: Mapping[str, object], find: Callable[[str], type[Compressor]] = find) -> Compressor:
    """Make a compressor from the result of `Compressor.to_dict`. `find` returns the class of a method's name."""
    settings = dict(content)
    cls = find(str(settings.pop("method")))
    if "compressors" in settings:  # a chain has other compressors as a field
        parts = settings["compressors"]
        if not isinstance(parts, list) or not all(isinstance(part, dict) and "method" in part for part in parts):
            raise UserError("compressors must be a list of objects, each with a method and its fields")
        settings["compressors"] = tuple(from_dict(part, find) for part in parts)
    return make(cls, settings)


def describe(cls: type[Compressor]) -> list[schema.FieldDescription]:
    """Describe the fields of a method: first its own, then the shared ones. The field `site` lists its sites only."""
    return schema.with_choices(schema.describe(cls), "site", cls.sites)


def _import(path: str) -> type[Compressor]:
    module, _, attribute = path.partition(":")
    if module.endswith(".py"):
        raise UserError(f"{path!r} names a file; give the module: {module.removesuffix('.py')}:{attribute}")
    own_files.search_for(module)
    try:
        method = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # an outside module can raise anything during its import
        raise UserError(f"cannot import the method {path!r}: {type(error).__name__}: {error}") from error
    if not _is_method(method):
        raise UserError(f"{path!r} is not a method: a method is a subclass of vlmzip.Compressor with assign()")
    return method


def _is_method(thing: object) -> TypeGuard[type[Compressor]]:
    return inspect.isclass(thing) and issubclass(thing, Compressor) and not inspect.isabstract(thing)
