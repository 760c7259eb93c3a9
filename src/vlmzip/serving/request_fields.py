"""Which fields of a method a request may set, for vlmzip's own server and for vLLM. It needs neither of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

from vlmzip.compressor import Compressor
from vlmzip.errors import UserError, alternatives


def refuse_fields(
    stage: Compressor,
    further: Sequence[str],
    *,
    known: Sequence[Compressor] = (),
    is_costly: Callable[[object], bool] = lambda value: True,
) -> None:
    """Raise `UserError` for a field that a request sets and may not, because it can make the method slow.

    A request may set budgets, the `further` fields, and any field to its default, to its value in a `known` method of
    this type, or to a value for which `is_costly` returns false.
    """
    allowed = (*stage.budget_fields, *further)
    for field in fields(stage):
        value = getattr(stage, field.name)
        values = [field.default, *(getattr(other, field.name) for other in known if type(other) is type(stage))]
        if field.name not in allowed and value not in values and is_costly(value):
            raise UserError(
                f"a request can set {alternatives(allowed)} of {stage.name()}, not {field.name}, which is set when the"
                " server starts"
            )
