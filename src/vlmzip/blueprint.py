"""The fields of methods and training runs, with types and defaults, read from source code.

Help texts need them at once, and importing these classes takes seconds, because they import torch.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

from vlmzip import outline, schema
from vlmzip.field_docs import field_docs
from vlmzip.outline import Outline
from vlmzip.schema import FieldDescription

#: Modules of vlmzip that import quickly. The others are read.
QUICK = ("vlmzip.keep", "vlmzip.schema", "vlmzip.sites")


def method(name: str) -> tuple[Outline, list[FieldDescription]]:
    """Return a method's outline and its fields, as `catalogue.describe` does. Raise `UserError` for an unknown name.

    Only methods from outside vlmzip are imported.
    """
    if name in outline.shipped():
        cls = blueprint(f"vlmzip.methods.{name}", outline.shipped()[name])
        return outline.method(name), schema.with_choices(_describe(cls), "site", cls.sites)
    from vlmzip import catalogue  # needs torch

    cls = catalogue.find(name)
    fields = catalogue.describe(cls)
    return outline.of_class(cls.name(), cls, {field.name: field.doc for field in fields}), fields


def describe(module: str, name: str) -> list[FieldDescription]:
    """Describe the fields of a dataclass, as `schema.describe` does."""
    return _describe(blueprint(module, name))


def _describe(cls: type) -> list[FieldDescription]:
    return schema.describe(cls, lambda owner: vars(owner)["field_docs"])


def blueprint(module: str, name: str) -> Any:
    """Return a dataclass with the fields of a class in the source and its `outline.VALUES`, but without its methods."""
    return _names(module)[name]


@cache
def _names(module: str) -> _Names:
    return _Names(module)


class _Names(dict[str, object]):
    """The names in a module of vlmzip. Each is evaluated when it is needed."""

    def __init__(self, module: str) -> None:
        self.tree = outline.parsed(*module.rsplit(".", 1))
        self.homes = outline.homes(self.tree)

    def __missing__(self, name: str) -> object:
        self[name] = value = self._imported(name) if name in self.homes else self._defined(name)
        return value

    def evaluate(self, expression: ast.expr) -> Any:
        return eval(compile(ast.Expression(expression), "<source>", "eval"), {}, self)

    def _imported(self, name: str) -> Any:
        home = self.homes[name]
        is_read = home.startswith("vlmzip.") and home not in QUICK
        return _names(home)[name] if is_read else getattr(import_module(home), name)

    def _defined(self, name: str) -> object:
        for statement in self.tree.body:
            if isinstance(statement, ast.ClassDef) and statement.name == name:
                return self._class(statement)
            if isinstance(statement, ast.Assign) and name in (names := _assigned(statement)):
                value = self.evaluate(statement.value)
                return value[names.index(name)] if len(names) > 1 else value
        raise KeyError(name)  # Python then looks among the built-in names

    def _class(self, definition: ast.ClassDef) -> type:
        fields: list[tuple[str, object, object]] = []
        attributes: dict[str, Any] = {"field_docs": field_docs(definition)}
        for name, annotation, value in _annotated(definition):
            if name in attributes["field_docs"]:
                fields.append((name, self.evaluate(annotation), self._default(value)))
            elif name in outline.VALUES and value is not None:
                attributes[name] = self.evaluate(value)
        bases = tuple(map(self.evaluate, definition.bases))
        return dataclasses.make_dataclass(
            definition.name, fields, bases=bases, namespace=attributes, frozen=True, kw_only=True
        )

    def _default(self, value: ast.expr | None) -> object:
        given = dataclasses.field() if value is None else self.evaluate(value)
        return given if isinstance(given, dataclasses.Field) else dataclasses.field(default=given)


def _assigned(statement: ast.Assign) -> list[str]:
    """Return the names that `a = …` or `a, b = …` assigns."""
    return [node.id for node in ast.walk(statement.targets[0]) if isinstance(node, ast.Name)]


def _annotated(definition: ast.ClassDef) -> Iterator[tuple[str, ast.expr, ast.expr | None]]:
    """Yield name, annotation and value of a class's fields and attributes. Without an annotation, the value is both."""
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign):
            yield ast.unparse(statement.target), statement.annotation, statement.value
        elif isinstance(statement, ast.Assign):
            yield ast.unparse(statement.targets[0]), statement.value, statement.value
