"""The signature of the façade's `forward`, from which trainers learn the inputs of the model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch


class names_inputs:
    """A `forward` whose signature on a façade names all inputs of the model inside.

    `Trainer` drops data set columns that are not in the signature. The names are those of the model's own `forward`,
    `get_image_features` and `get_video_features`, so they differ from façade to façade.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward

    def __get__(self, facade: Any, _owner: object = None) -> Any:
        if facade is None:
            return self._forward
        # A partial can have a signature, a bound method cannot. torch.compile knows bound methods.
        return MethodType(self._forward, facade) if torch.compiler.is_compiling() else _Bound(self._forward, facade)


class _Bound(partial):  # type: ignore[type-arg]
    """A `forward` bound to a façade."""

    @property
    def __signature__(self) -> inspect.Signature:
        (facade,) = self.args
        _, *named, others = inspect.signature(self.func).parameters.values()  # without self, and **kwargs apart
        names = dict.fromkeys(name for method in facade._family.input_methods for name in _parameters(method))
        for parameter in named:
            names.pop(parameter.name, None)
        added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
        return inspect.Signature([*named, *added, others])


def _parameters(method: Callable[..., Any]) -> list[str]:
    """Return the names of a method's parameters, without `*args` and `**kwargs`."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, each in inspect.signature(method).parameters.items() if each.kind not in variable]
