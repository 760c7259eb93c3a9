"""Budgets of visual tokens. All code that reads, checks or rounds a budget is here."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Predicate

from vlmzip.errors import BudgetError, UserError

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema


def is_keep(keep: int | float | str) -> bool:
    """Return true for a valid budget. Raise `UserError` for an invalid one."""
    parse_keep(keep)
    return True


class AllAsPercent:
    """Let a field keep "100%" in place of 1.0.

    In Python, 1.0 == 1, and JSON and caches compare like that. But 1.0 keeps all tokens, and 1 keeps one.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core.core_schema import no_info_after_validator_function  # slow

        return no_info_after_validator_function(self.converted, handler(source))

    @staticmethod
    def converted(keep: int | float | str) -> int | float | str:
        """Return "100%" for 1.0, and any other budget as it is."""
        return "100%" if isinstance(keep, float) and keep == 1.0 else keep


#: A budget: an int is a number of tokens per image, a float in (0, 1] a fraction, a string either ("64", "11%"). A
#: compressor keeps 1.0 as "100%".
Keep = Annotated[int | float | str, "64, 0.25 or '25%'", Predicate(is_keep), AllAsPercent()]
#: The default budget of methods: a ninth, as in VisionZip's 64 of 576 tokens and DFMR's 3 x 3 windows.
A_NINTH = 1 / 9
#: Used in place of a budget: methods keep their own settings.
AS_SET = "as-set"


def parse_keep(keep: Keep, option: str = "") -> int | float:
    """Read a budget as a count (int) or a fraction (float). `option` is the command-line option, for messages.

    Raise `UserError` for a value that is neither a whole number of at least 1 nor a fraction in (0, 1].
    """
    value = _number(keep, option or "keep")
    if isinstance(value, int):
        if value < 1:
            written = f"{option} {keep}" if option else f"keep={keep!r}"
            raise UserError(f"{written} keeps nothing; give at least 1 token, or a fraction such as 0.25 or '25%'")
        return value
    if math.isnan(value) or not 0 < value <= 1:
        raise UserError(
            f"{option or 'keep'} must be a fraction in (0, 1], got {keep!r};"
            " write 64 for 64 tokens, 0.25 or '25%' for a quarter"
        )
    return value


def count_to_keep(keep: Keep, available: int) -> int:
    """Return the number of tokens to keep out of `available`, from 1 to `available`.

    A fraction is rounded to the nearest whole token, halves up: 11 % of 576 is 63, and 1/9 of 576 is 64.
    """
    value = parse_keep(keep)
    count = value if isinstance(value, int) else round_half_up(value * available)
    return min(max(count, 1), available)


def shared_out(count: int, sizes: Sequence[int]) -> list[int]:
    """Divide a count of tokens among the views of an image, in proportion to their sizes.

    Every view gets at least one token and at most all its tokens. The shares add up to `count`, or to all tokens if
    `count` is larger. Shares of equally large views differ by at most one token; the first views get more. Raise
    `BudgetError` if there are more views than tokens.
    """
    if count < len(sizes):
        raise BudgetError(f"keep={count} is too few for an image of {len(sizes)} views: give at least {len(sizes)}")
    total = min(count, sum(sizes))
    exact = [total * size / sum(sizes) for size in sizes]
    shares = [min(max(math.floor(share), 1), size) for share, size in zip(exact, sizes, strict=True)]
    # Rounding down leaves tokens over: give them to the views that lost most. The minimum of 1 can take too many: take
    # them from the views that gained most.
    while (missing := total - sum(shares)) != 0:
        step = 1 if missing > 0 else -1
        changeable = [n for n, share in enumerate(shares) if (share < sizes[n] if step > 0 else share > 1)]
        chosen = max(changeable, key=lambda n: (step * (exact[n] - shares[n]), -n))
        shares[chosen] += step
    return shares


def round_half_up(value: float) -> int:
    """Round to the nearest integer, halves up. Python's `round` would round 2.5 to 2."""
    return math.floor(value + 0.5)


def _number(keep: Keep, name: str) -> int | float:
    if isinstance(keep, str):
        return _from_text(keep, name)
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise UserError(f"{name} must be a number, got {keep!r}; write 64, 0.25 or '25%'")
    return int(keep) if isinstance(keep, numbers.Integral) else float(keep)


def _from_text(text: str, name: str) -> int | float:
    stripped = text.strip()
    try:
        stripped.encode("ascii")  # Python would read digits of other scripts, too
        if stripped.endswith("%"):
            return float(stripped[:-1]) / 100
        return int(stripped) if stripped.lstrip("+-").isdigit() else float(stripped)
    except ValueError:
        raise UserError(f"{name} must be a number, got {text!r}; write 64, 0.25 or '25%'") from None
