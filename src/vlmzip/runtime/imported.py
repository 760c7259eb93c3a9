"""Find the source files of a class outside this package: its own file, and those in its folder that it imports.

Imports are read from the source, not from `sys.modules`. A module that a method imports while it works would not be in
`sys.modules` before the first answer, but would be there afterwards.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import vlmzip

#: Top-level modules that do not belong to a user.
FOREIGN = {vlmzip.__name__, *sys.stdlib_module_names}
#: Names of the folders that contain installed packages.
INSTALLED = {"site-packages", "dist-packages"}


def files_of(cls: type) -> set[Path]:
    """Return the file of a class, and the files that it imports, directly or not, from its top-level module's folder.

    For a class of an installed package, return only its own file; for a class of vlmzip or of Python's standard
    library, return nothing.
    """
    if cls.__module__.partition(".")[0] in FOREIGN or (file := _source(cls)) is None:
        return set()
    if INSTALLED & set(file.parts):
        return {file}
    folder = file.parents[cls.__module__.count(".") + (file.name == "__init__.py")]
    files, pending = {file}, [(cls.__module__, file)]
    while pending:
        for name in _imports(*pending.pop()):
            path = _find(folder, name)
            if path is not None and path not in files:
                files.add(path)
                pending.append((name, path))
    return files


def _imports(module: str, file: Path) -> Iterator[str]:
    """Yield the full names of all modules that a module may import, anywhere in it, and of their parent packages."""
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for name in _written_imports(package, file):
        if name.partition(".")[0] not in FOREIGN:
            yield from accumulate(name.split("."), lambda outer, inner: f"{outer}.{inner}")


def _written_imports(package: list[str], file: Path) -> Iterator[str]:
    """Yield the full name of everything that a file's import statements name."""
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # a file without imports; its content is still hashed
        return
    for statement in ast.walk(tree):
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom):
            outer = package[: len(package) + 1 - statement.level] if statement.level else []
            start = [*outer, *filter(None, [statement.module])]
            yield from (".".join([*start, alias.name]) for alias in statement.names)  # a module, or a name in a module


def _find(folder: Path, module: str) -> Path | None:
    path = folder.joinpath(*module.split("."))
    candidates = (path / "__init__.py", path.with_name(f"{path.name}.py"))
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _source(cls: type) -> Path | None:
    try:
        file = inspect.getsourcefile(cls)
    except TypeError:  # a built-in class, or one defined in a console
        return None
    return None if file is None else Path(file).absolute()
