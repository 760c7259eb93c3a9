"""Import the user's own method files, and what they import, from the current folder.

The folder is not put on `sys.path`: Python would then search it for every package that is not installed. A
`tabulate.py` beside somebody's images would run as soon as a library looks for tabulate.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import FrameType, ModuleType

from vlmzip.errors import UserError

#: The entry-point group in which installed packages offer methods.
ENTRY_POINTS = "vlmzip.methods"


class _OwnFiles(MetaPathFinder):
    """An import finder for modules that the user named and for the modules that those import, at any time."""

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}
        """The folder of each top-level module that was named, or found as an import of one."""
        self.closed = False
        """Whether `search_for` refuses new modules."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        folder = self.folders.get(name) or self.folders.get(_importer())
        if path is not None or folder is None:  # Python finds the submodules of a package itself
            return None
        module_spec = PathFinder.find_spec(name, [folder])
        if module_spec is not None:
            self.folders[name] = folder
        return module_spec


_FINDER = _OwnFiles()


def search_for(module: str) -> None:
    """Let `module` be imported from the current folder, unless an installed package has that name.

    Raise `UserError` inside `left_alone` if the current folder has such a file.
    """
    top = module.partition(".")[0]
    if not top or top in sys.modules or find_spec(top) is not None:
        return
    if _FINDER.closed:
        if PathFinder.find_spec(top, [os.getcwd()]) is not None:
            raise UserError(f"{top!r} is a file of this folder, and files of this folder are not run here")
        return
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)
    _FINDER.folders[top] = os.getcwd()


def is_own(module: str) -> bool:
    """Return whether `module` was imported from the current folder by `search_for`."""
    return module.partition(".")[0] in _FINDER.folders


def make(module: str, name: str, settings: dict[str, object]) -> object:
    """Make an instance of a class in the user's own file; search for the file first, as another process must."""
    search_for(module)
    return getattr(import_module(module), name)(**settings)


@contextmanager
def left_alone() -> Iterator[None]:
    """Refuse to import anything new from the current folder inside the block."""
    _FINDER.closed = True
    try:
        yield
    finally:
        _FINDER.closed = False


def _importer() -> str:
    """Return the top-level module whose code is importing."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and str(frame.f_globals.get("__name__")).startswith("importlib"):
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__name__")).partition(".")[0]
