"""Methods in files of the user's own: the current folder is searched for them and for what they import, for no others.

A folder on `sys.path` would be searched for every package that is not installed: a `tabulate.py` beside somebody's
images would run as soon as a library looks for tabulate.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import FrameType, ModuleType

from vlmzip.errors import UserError


class _OwnFiles(MetaPathFinder):
    """Finds modules that were asked for by name, and those that they import, at whatever time they do."""

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}
        """The folder of each top-level module that is searched for, or was found."""
        self.closed = False
        """Whether nothing new may be asked for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = self.folders.get(name) or self.folders.get(_importer())
        if path is not None or folder is None:  # what lies in a package is found without us
            return None
        found = PathFinder.find_spec(name, [folder])
        if found is not None:
            self.folders[name] = folder
        return found


_FINDER = _OwnFiles()


def search_for(module: str) -> None:
    """Let `module` be imported from the current folder, if no installed package has that name.

    Raises `UserError` for a file that is there, within `left_alone`.
    """
    top = module.partition(".")[0]
    if not top or top in sys.modules or find_spec(top) is not None:
        return
    if _FINDER.closed:
        if PathFinder.find_spec(top, [os.getcwd()]) is not None:
            raise UserError(f"{top!r} is a file of this folder, and nothing of yours is run here")
        return
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
    _FINDER.folders[top] = os.getcwd()


def is_own(module: str) -> bool:
    """Whether `module` came from a file that was found here."""
    return module.partition(".")[0] in _FINDER.folders


@contextmanager
def left_alone() -> Iterator[None]:
    """Import nothing new from the current folder for a block."""
    _FINDER.closed = True
    try:
        yield
    finally:
        _FINDER.closed = False


def _importer() -> str:
    """The top-level module whose code is importing."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and str(frame.f_globals.get("__name__")).startswith("importlib"):
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__")).partition(".")[0]
