"""Check shapes and types in signatures while tests run.

The import hook of jaxtyping decorates every function with `jaxtyping.jaxtyped`. This compares the names of axes within
a call, but costs two type checks a call, and milliseconds whenever a function inside a function is defined. Only
signatures with shapes need it. For the others beartype is enough, and functions inside functions are checked only if
they have shapes.
"""

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import jaxtyping

jaxtyped = jaxtyping.jaxtyped


def check_signatures(modules: list[str]) -> None:
    """Check the signatures of these modules of vlmzip, and of the modules in them, once they are imported."""
    jaxtyping.jaxtyped = checked
    jaxtyping.install_import_hook([f"vlmzip.{name}" for name in modules], "beartype.beartype")


def checked(decorated=None, *, typechecker: Callable):
    """Return a function that checks its signature, or a dataclass whose `__init__` does."""
    if decorated is None:
        return partial(checked, typechecker=typechecker)
    if not isinstance(decorated, FunctionType):
        return jaxtyped(decorated, typechecker=typechecker)
    hints = {name: hint_of(annotation, decorated) for name, annotation in decorated.__annotations__.items()}
    if any("jaxtyping" in repr(hint) for hint in hints.values()):
        return jaxtyped(decorated, typechecker=typechecker)
    if "<locals>" in decorated.__qualname__:
        return decorated
    decorated.__annotations__ = hints
    return typechecker(decorated)


def hint_of(annotation: Any, function: FunctionType) -> Any:
    """Return the type that an annotation names; Any, if the module does not have it yet, as jaxtyping does."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, function.__globals__)
    except Exception:
        return Any
