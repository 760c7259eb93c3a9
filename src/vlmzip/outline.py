"""Names, docstrings and class attributes of methods and model families, read from their source code.

Listing them must be fast. Importing them takes seconds, because they import torch.
"""

from __future__ import annotations

import ast
import inspect
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from typing import Any

from vlmzip.field_docs import field_docs, with_docs
from vlmzip.files import is_folder
from vlmzip.own_files import ENTRY_POINTS
from vlmzip.sites import SIGNALS_OF_TEXT, Signal, Site

#: How a user can write a method, for help texts and messages.
METHOD_FORMS = 'a name from `vlmzip methods`, "visionzip(merge=mean)", "dfmr+fastv(layer=3)" or a saved compressor.json'
#: The file of a saved compressor.
FILE = "compressor.json"
#: The class attributes to read, in addition to docstring and fields.
VALUES = (
    "paper", "sites", "needs", "examples", "model_types", "example", "kind", "cost", "published", "published_in",
    "trained_weights", "videos_only",
)  # fmt: skip
#: The names that the expressions of these attributes may use.
WORDS = {"Site": Site, "Signal": Signal, "frozenset": frozenset, "tuple": tuple}


@dataclass
class Outline:
    """The outline of a class, read from its source."""

    name: str
    """The stem of its file name."""
    doc: str
    """The docstring."""
    values: dict[str, Any] = field(default_factory=dict)
    """The attributes of `VALUES` that the class or a base class sets."""
    fields: dict[str, str] = field(default_factory=dict)
    """A method's fields with their documentation."""

    @property
    def summary(self) -> str:
        """Return the first line of the docstring."""
        return self.doc.partition("\n")[0]


@dataclass(frozen=True)
class Facts:
    """A method's entry in the catalogue."""

    name: str
    kind: str
    sites: list[str]
    needs: list[str]
    text_aware: bool
    cost: str
    trained_weights: bool
    videos_only: bool
    paper: str
    published: dict[str, float]
    """The published percentage of LLaVA-1.5-7B's score that remains, by kept tokens of 576."""
    published_in: str
    summary: str

    @classmethod
    def of(cls, method: Outline) -> Facts:
        values = method.values
        return cls(
            name=method.name,
            kind=values["kind"],
            sites=[str(site) for site in values["sites"]],
            needs=sorted(map(str, values["needs"])),
            text_aware=bool(values["needs"] & SIGNALS_OF_TEXT),
            cost=values["cost"],
            trained_weights=values["trained_weights"],
            videos_only=values["videos_only"],
            paper=values["paper"],
            published={str(kept): score for kept, score in values["published"].items()},
            published_in=values["published_in"],
            summary=method.summary,
        )

    @property
    def scores(self) -> str:
        """Return the published scores at 192, 128 and 64 tokens, "-" for an unknown one; "" if there are none."""
        scores = [str(self.published.get(kept, "-")) for kept in ("192", "128", "64")]
        return " / ".join(scores) if self.published else ""

    def scores_from(self, letters: Mapping[str, str]) -> str:
        """Return the published scores with the letter of their source."""
        return f"{self.scores} {letters[self.published_in]}" if self.published else ""


def source_letters(methods: Iterable[Facts]) -> dict[str, str]:
    """Return a letter for each source of published scores. Scores of different sources cannot be compared."""
    sources = dict.fromkeys(facts.published_in for facts in methods if facts.published)
    return dict(zip(sources, string.ascii_lowercase, strict=False))


def methods() -> list[Outline]:
    """Return every method, sorted by name. If installed packages offer methods, all methods are imported."""
    if not entry_points(group=ENTRY_POINTS):
        return sorted(_of_package("vlmzip.methods"), key=lambda outline: outline.name)
    from vlmzip import catalogue  # needs torch

    outlines = []
    for name, cls in catalogue.available().items():
        fields = {field.name: field.doc for field in catalogue.describe(cls)}
        outlines.append(of_class(name, cls, fields))
    return outlines


def of_class(name: str, cls: type, fields: dict[str, str]) -> Outline:
    """Return the outline of an imported method, whose fields have this documentation."""
    values = {value: getattr(cls, value) for value in VALUES if hasattr(cls, value)}
    return Outline(name, inspect.getdoc(cls) or "", values, fields)


def method(name: str) -> Outline:
    """Return a method of `vlmzip.methods`."""
    return _outline(f"vlmzip.methods.{name}", shipped()[name])


def is_name(spec: str) -> bool:
    """Return whether a spec is a single method without settings, so that command-line options can set its fields."""
    return not is_saved(spec) and not set("+()") & set(spec)


def is_saved(spec: str) -> bool:
    """Return whether a spec is the path of a saved compressor."""
    names_folder = is_folder(spec) and spec not in ("", *(outline.name for outline in methods()))
    return spec.endswith(".json") or "/" in spec or names_folder


def method_classes() -> list[str]:
    """Return the class names of the methods in `vlmzip.methods`."""
    return list(shipped().values())


def shipped() -> dict[str, str]:
    """Return the class names of the methods in `vlmzip.methods`, by the names of the methods."""
    modules = homes(parsed("vlmzip.methods", "__init__"))
    return {module.rpartition(".")[2]: name for name, module in modules.items() if module.startswith("vlmzip.methods.")}


def families() -> list[Outline]:
    """Return every model family; the base class is not one."""
    return [outline for outline in _of_package("vlmzip.models") if outline.values.get("example")]


def summary(package: str, file: str) -> str:
    """Return the first line of a module's docstring."""
    return (ast.get_docstring(parsed(package, file)) or "").partition("\n")[0]


def _of_package(package: str) -> list[Outline]:
    """Return the classes that a package's `__init__` imports from its own modules."""
    modules = {n: m for n, m in homes(parsed(package, "__init__")).items() if m.startswith(f"{package}.")}
    return [_outline(module, name) for name, module in modules.items() if name in _classes(module)]


def _classes(module: str) -> dict[str, ast.ClassDef]:
    """Return the classes that a module defines, by name."""
    return {node.name: node for node in parsed(*module.rsplit(".", 1)).body if isinstance(node, ast.ClassDef)}


def _outline(module: str, name: str) -> Outline:
    classes = _classes(module)
    modules = dict.fromkeys(classes, module) | homes(parsed(*module.rsplit(".", 1)))
    definition = classes[name]
    outline = Outline(module.rpartition(".")[2], ast.get_docstring(definition) or "")
    for base in map(ast.unparse, definition.bases):
        if modules.get(base, "").startswith("vlmzip."):
            inherited = _outline(modules[base], base)
            outline.values |= inherited.values
            outline.fields |= inherited.fields
    outline.fields = with_docs(outline.fields, field_docs(definition))
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign):
            target, value = ast.unparse(statement.target), statement.value
        elif isinstance(statement, ast.Assign):
            target, value = ast.unparse(statement.targets[0]), statement.value
        else:
            continue
        if target in VALUES and value is not None:
            outline.values[target] = eval(ast.unparse(value), dict(WORDS))
    return outline


def homes(tree: ast.Module) -> dict[str, str]:
    """Return the module of every name that a file imports by `from module import name`."""
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or "" for node in imports for alias in node.names}


@cache
def parsed(package: str, file: str) -> ast.Module:
    folder = files("vlmzip").joinpath(*package.split(".")[1:])
    return ast.parse(folder.joinpath(f"{file}.py").read_text(encoding="utf-8"))
