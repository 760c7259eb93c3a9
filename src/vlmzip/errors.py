"""Errors that are the user's to mend. The command line prints them as one line and exits with code 2."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """The input is wrong; the message says what is wrong and what to do, in one line."""


def closest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'visionzip'?"` for a near miss, else the list of what there is."""
    known = sorted(known)
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known)}"


def reason(error: BaseException) -> str:
    """Why something could not be done, in one line: the message, after its kind where nobody wrote it for users."""
    said = " ".join(str(error).split())
    return said if isinstance(error, UserError) else f"failed with {type(error).__name__}: {said}"[:300]
