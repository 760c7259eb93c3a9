"""How many visual tokens to keep: read, checked and rounded here and nowhere else."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Annotated

from annotated_types import Predicate

from vlmzip.errors import UserError


def is_keep(keep: int | float | str) -> bool:
    """Return whether a budget can be read: always true, or a `UserError` that says what is wrong."""
    parse_keep(keep)
    return True


#: An int is a number of tokens per image, a float in (0, 1] a fraction of them, a string either ("64", "11%").
Keep = Annotated[int | float | str, "64, 0.25 or '25%'", Predicate(is_keep)]
#: What methods keep when nothing is asked: a ninth, as VisionZip's 64 of 576 and DFMR's 3 x 3 windows.
A_NINTH = 1 / 9
#: In place of a budget: methods as they are written, with their own settings.
AS_SET = "as-set"


def parse_keep(keep: Keep, option: str = "") -> int | float:
    """Turns `keep` into a count (int) or a fraction (float). `option` is where a user wrote it, for messages.

    Raises `UserError` for anything that is neither a whole number of at least 1 nor a fraction in (0, 1].
    """
    said = f"{option} {keep}" if option else f"keep={keep!r}"
    value = _number(keep, said)
    if isinstance(value, int):
        if value < 1:
            raise UserError(f"{said} keeps nothing; give at least 1 token, or a fraction such as 0.25 or '25%'")
        return value
    if math.isnan(value) or not 0 < value <= 1:
        raise UserError(f"{said} is no fraction in (0, 1]; write 64 for 64 tokens, 0.25 or '25%' for a quarter")
    return value


def count_to_keep(keep: Keep, available: int) -> int:
    """The number of tokens that `keep` means out of `available`: at least 1, never more than there are.

    A fraction is rounded to the nearest whole token, halves up: 11 % of 576 is 63, 1/9 of it 64.
    """
    value = parse_keep(keep)
    wanted = value if isinstance(value, int) else round_half_up(value * available)
    return min(max(wanted, 1), available)


def shared_out(count: int, sizes: Sequence[int]) -> list[int]:
    """Share a count of tokens out over the views of an image, in proportion to their sizes.

    Every view gets at least one token and at most as many as it has; the shares add up to `count`, or to all there is.
    Views of equal size differ by one token at most: the first ones get more. Raises `UserError` where the count does
    not reach for one token each.
    """
    if count < len(sizes):
        raise UserError(f"keep={count} is too few for an image of {len(sizes)} views: give at least {len(sizes)}")
    wanted = min(count, sum(sizes))
    exact = [wanted * size / sum(sizes) for size in sizes]
    shares = [min(max(math.floor(share), 1), size) for share, size in zip(exact, sizes, strict=True)]
    # What rounding left over goes to those that lost most by it; what the minimum of 1 took, from those that won most.
    while (missing := wanted - sum(shares)) != 0:
        step = 1 if missing > 0 else -1
        able = [n for n, share in enumerate(shares) if (share < sizes[n] if step > 0 else share > 1)]
        chosen = max(able, key=lambda n: (step * (exact[n] - shares[n]), -n))
        shares[chosen] += step
    return shares


def round_half_up(value: float) -> int:
    """Rounds to the nearest integer, halves up; Python's own `round` would send 2.5 to 2."""
    return math.floor(value + 0.5)


def _number(keep: Keep, said: str) -> int | float:
    if isinstance(keep, str):
        return _from_text(keep, said)
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise UserError(f"{said} is no number; write 64, 0.25 or '25%'")
    return int(keep) if isinstance(keep, numbers.Integral) else float(keep)


def _from_text(text: str, said: str) -> int | float:
    stripped = text.strip()
    try:
        if stripped.endswith("%"):
            return float(stripped[:-1]) / 100
        return int(stripped) if stripped.lstrip("+-").isdigit() else float(stripped)
    except ValueError:
        raise UserError(f"{said} is no number; write 64, 0.25 or '25%'") from None
