"""The documentation of a dataclass's fields: the string below each field in the source."""

from __future__ import annotations

import ast


def field_docs(definition: ast.stmt) -> dict[str, str]:
    """Return the fields that a dataclass declares and the string below each, joined to one line, or ""."""
    docs: dict[str, str] = {}
    name = ""
    for statement in getattr(definition, "body", []):
        if isinstance(statement, ast.AnnAssign):
            is_field = not ast.unparse(statement.annotation).startswith("ClassVar")
            name = ast.unparse(statement.target) if is_field else ""
            docs |= {name: ""} if is_field else {}
        elif name and isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            docs[name] = " ".join(str(statement.value.value).split())
            name = ""
    return docs


def with_docs(inherited: dict[str, str], declared: dict[str, str]) -> dict[str, str]:
    """Return the fields of a class with their documentation. Fields without a string inherit that of the base class."""
    return inherited | {name: doc or inherited.get(name, "") for name, doc in declared.items()}
