"""The KV cache under both of its names: transformers 5.24 renamed `past_key_values` to `cache`.

Callers may use either name with every supported version of transformers.
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

#: The name since transformers 5.24, and the name before.
NAMES = ("cache", "past_key_values")


def cache_name(model: nn.Module) -> str:
    """Return the name of the argument by which `model.forward` takes its KV cache.

    Raise `UserError` if it has no argument with a name that vlmzip knows.
    """
    parameters = inspect.signature(model.forward).parameters
    for name in NAMES:
        if name in parameters:
            return name
    raise unknown_interface(f"{type(model).__name__}.forward takes no KV cache named {' or '.join(NAMES)}")


def cache_of(values: Mapping[str, object]) -> Any:
    """Return the KV cache in a call's arguments or a model's outputs, or `None` if they contain no cache.

    Raise `UserError` if both names are given.
    """
    # Do not use `values.get`: an output of transformers 5.24 warns if it is read under the old name.
    caches = {name: value for name, value in values.items() if name in NAMES and value is not None}
    if len(caches) > 1:
        raise UserError(f"{' and '.join(NAMES)} are two names of the KV cache: give one of them")
    return next(iter(caches.values()), None)


def returned_cache(out: Any) -> Any:
    """Return the KV cache in the output of a model's `forward`, a dict or a tuple; `None` if it contains no cache."""
    if not isinstance(out, tuple):
        return cache_of(out)
    return next((value for value in out if isinstance(value, Cache)), None)


def cache_argument(arguments: Inputs, called: str) -> Any:
    """Return the KV cache among the arguments that a hook sees, or `None` if the argument is `None`.

    Raise `UserError` if neither name is among the arguments. Otherwise a third name for the cache would look like "no
    cache". The message names the module as `called`.
    """
    if not any(name in arguments for name in NAMES):
        raise unknown_interface(f"{called} was called without {' or '.join(NAMES)}")
    return cache_of(arguments)


def with_cache_named(arguments: Inputs, name: str) -> InputDict:
    """Return `arguments` with the KV cache renamed to `name`, if they contain a cache."""
    cache = cache_of(arguments)
    out = {key: value for key, value in arguments.items() if key not in NAMES}
    return out if cache is None else {**out, name: cache}
