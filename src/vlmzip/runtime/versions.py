"""The versions of transformers that vlmzip is tested with, and messages about others."""

from __future__ import annotations

import inspect
import warnings
from functools import cache
from typing import Any

import transformers
from packaging.version import Version
from torch import nn

from vlmzip.errors import UserError
from vlmzip.processor import Inputs

#: The oldest and the newest minor version of transformers that the tests pass with.
OLDEST, NEWEST = "5.18", "5.24"


def warn_if_untested() -> None:
    """Warn, once per process, if transformers is newer than every tested version."""
    version = Version(transformers.__version__)
    if (version.major, version.minor) > tuple(Version(NEWEST).release[:2]):
        _warn(f"vlmzip is tested with transformers {OLDEST} to {NEWEST}; {version} is newer and may behave differently")


@cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)


def unknown_interface(what: str) -> UserError:
    """Return the error for a model whose structure or calls vlmzip does not know."""
    return UserError(
        f"{what}: transformers {transformers.__version__} may have changed it;"
        f" use a version from {OLDEST} to {NEWEST}, or update vlmzip"
    )


def check_takes(model: nn.Module, name: str) -> None:
    """Raise `UserError` unless `model.forward` has a parameter `name`: it may silently accept and ignore others."""
    if name not in inspect.signature(model.forward).parameters:
        raise unknown_interface(f"{type(model).__name__}.forward takes no {name}")


def argument(arguments: Inputs, name: str, called: str) -> Any:
    """Return the argument `name` of a call that a hook sees.

    Raise `UserError` if the call does not have it: a default would be a guess. `called` names the call in the message.
    """
    if name not in arguments:
        raise unknown_interface(f"{called} was called without {name}")
    return arguments[name]
