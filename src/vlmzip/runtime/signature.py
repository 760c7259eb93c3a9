"""The signature of the façade's `forward`, from which trainers learn the inputs of the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from vlmzip.models import FAMILIES

Forward = TypeVar("Forward", bound=Callable[..., object])


def names_image_inputs(forward: Forward) -> Forward:
    """Add the image inputs of all families to the signature of a `forward`.

    `Trainer` drops data set columns that are not in the signature.
    """
    signature = inspect.signature(forward)
    *named, others = signature.parameters.values()  # the last parameter is **kwargs, which receives the added inputs
    names = [name for family in FAMILIES for name in family.image_inputs if name not in signature.parameters]
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Tensor | None)
        for name in dict.fromkeys(names)
    ]
    forward.__signature__ = signature.replace(parameters=[*named, *added, others])  # type: ignore[attr-defined]
    return forward
