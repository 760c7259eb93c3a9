"""The signature of the façade's `forward`, by which trainers decide what the model takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from vlmzip.models import FAMILIES

Forward = TypeVar("Forward", bound=Callable[..., object])


def names_image_inputs(forward: Forward) -> Forward:
    """Decorate a `forward` whose signature shall name what describes images in any family.

    `Trainer` drops the columns of a data set that it does not find in the signature.
    """
    signature = inspect.signature(forward)
    *named, others = signature.parameters.values()  # the last is **kwargs, which takes them
    names = [name for family in FAMILIES for name in family.image_inputs if name not in signature.parameters]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Tensor | None)
        for name in dict.fromkeys(names)
    ]
    forward.__signature__ = signature.replace(parameters=[*named, *added, others])  # type: ignore[attr-defined]
    return forward
