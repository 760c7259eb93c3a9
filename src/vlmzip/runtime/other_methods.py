"""Messages about a method that does not fit a model name methods that fit every model."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from vlmzip import schema
from vlmzip.catalogue import available
from vlmzip.compressor import Compressor
from vlmzip.errors import ADD_A_FAMILY, UnfitMethod
from vlmzip.sites import ATTENTION_OF_ENCODERS
from vlmzip.visual_tokens import Signal, Site

P = ParamSpec("P")
T = TypeVar("T")

#: What a method may need that some models lack.
SIGNALS_OF_ENCODERS = ATTENTION_OF_ENCODERS | {Signal.PIXELS, Signal.PROJECTOR}


def names_other_methods(function: Callable[P, T]) -> Callable[P, T]:
    """Return `function` with methods that work added to the message of its `UnfitMethod` errors."""

    @wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except UnfitMethod as error:
            names = ", ".join(fit_every_model())
            raise UnfitMethod(f"{error}; these methods work, among others: {names}; {ADD_A_FAMILY}") from None

    return named


def fit_every_model() -> list[str]:
    """Return the names of the methods for images that need nothing but the visual tokens before the LLM."""
    return [
        name for name, method in available(videos_only=False).items() if not schema.required(method) and _fits(method())
    ]


def _fits(method: Compressor) -> bool:
    if method.changes_nothing or method.for_training_only or method.trained_weights:
        return False
    stages = method.stages()
    return all(Site.PRE_PROJECTOR in stage.sites and not stage.needs & SIGNALS_OF_ENCODERS for stage in stages)
