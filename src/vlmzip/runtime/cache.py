"""The KV cache under either of its names: transformers 5.24 renamed `past_key_values` to `cache`.

Callers may use either name in any supported version. Inside vlmzip nobody else spells the names out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import Cache

from vlmzip.errors import UserError
from vlmzip.processor import InputDict, Inputs
from vlmzip.runtime.versions import unknown_interface

#: The name since transformers 5.24, and the one before.
NAMES = ("cache", "past_key_values")


def cache_name(model: nn.Module) -> str:
    """Return the name by which `model.forward` takes its KV cache.

    Raise `UserError` if it takes none under a name that vlmzip knows.
    """
    parameters = inspect.signature(model.forward).parameters
    for name in NAMES:
        if name in parameters:
            return name
    raise unknown_interface(f"{type(model).__name__}.forward takes no KV cache named {' or '.join(NAMES)}")


def cache_of(values: Mapping[str, object]) -> Any:
    """Return the KV cache among arguments or a model's outputs, `None` if there is none.

    Raise `UserError` for two of them.
    """
    # Not `values.get`: an output of transformers 5.24 warns when it is asked by the old name.
    found = {name: value for name, value in values.items() if name in NAMES and value is not None}
    if len(found) > 1:
        raise UserError(f"{' and '.join(NAMES)} are two names of the KV cache: give one of them")
    return next(iter(found.values()), None)


def returned_cache(out: Any) -> Any:
    """Return the KV cache that a model's `forward` returned, in a dict or a tuple; `None` if there is none."""
    if not isinstance(out, tuple):
        return cache_of(out)
    return next((value for value in out if isinstance(value, Cache)), None)


def cache_argument(arguments: Inputs, called: str) -> Any:
    """Return the KV cache of a call that a hook sees, `None` if it was called with `None`.

    Raise `UserError` if the call names no cache: a third name would otherwise pass for "no cache". `called` is for the
    message.
    """
    if not any(name in arguments for name in NAMES):
        raise unknown_interface(f"{called} was called without {' or '.join(NAMES)}")
    return cache_of(arguments)


def with_cache_named(arguments: Inputs, name: str) -> InputDict:
    """Return `arguments` with the KV cache, if there is one, under `name`."""
    cache = cache_of(arguments)
    out = {key: value for key, value in arguments.items() if key not in NAMES}
    return out if cache is None else {**out, name: cache}
