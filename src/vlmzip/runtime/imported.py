"""The files that a class outside of this package is made of: its own, and those beside it that it imports.

Imports are read from the source, not from `sys.modules`: a module that a method imports as late as it works would be
missing before the first answer and be there after it.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import vlmzip

#: Top-level modules that are no user's.
FOREIGN = {vlmzip.__name__, *sys.stdlib_module_names}
#: Folders of installed packages have one of these names.
INSTALLED = {"site-packages", "dist-packages"}


def files_of(cls: type) -> set[Path]:
    """Return the file of a class and those that it imports, directly or not, from the folder of its top-level module.

    Of an installed package, it is the file of the class alone; of this package and Python's own, none.
    """
    if cls.__module__.partition(".")[0] in FOREIGN or (file := _source(cls)) is None:
        return set()
    if INSTALLED & set(file.parts):
        return {file}
    folder = file.parents[cls.__module__.count(".") + (file.name == "__init__.py")]
    found, left = {file}, [(cls.__module__, file)]
    while left:
        for name in _imports(*left.pop()):
            path = _find(folder, name)
            if path is not None and path not in found:
                found.add(path)
                left.append((name, path))
    return found


def _imports(module: str, file: Path) -> Iterator[str]:
    """Yield the full names of all modules that a module may import, anywhere in it, and of the packages around them."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for name in _written_imports(package, file):
        if name.partition(".")[0] not in FOREIGN:
            yield from accumulate(name.split("."), lambda outer, inner: f"{outer}.{inner}")


def _written_imports(package: list[str], file: Path) -> Iterator[str]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # its content still counts, as far as it can be read
        return
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Import):
            yield from (one.name for one in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            outer = package[: len(package) + 1 - statement.level] if statement.level else []
            start = [*outer, *filter(None, [statement.module])]
            yield from (".".join([*start, one.name]) for one in statement.names)  # a module, or a name in one


def _find(folder: Path, module: str) -> Path | None:
    path = folder.joinpath(*module.split("."))
    places = (path / "__init__.py", path.with_name(f"{path.name}.py"))
    return next((place for place in places if place.is_file()), None)


def _source(cls: type) -> Path | None:
    try:
        found = inspect.getsourcefile(cls)
    except TypeError:  # a class of a console, or built in
        return None
    return None if found is None else Path(found).absolute()
