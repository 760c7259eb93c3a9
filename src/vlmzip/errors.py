"""Errors that are the user's to mend. The command line prints them as one line and exits with code 2."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import SequenceMatcher, get_close_matches
from typing import Any

#: Letters of a word of which a few are in many names.
SHORT = 4


class UserError(ValueError):
    """The input is wrong; the message says what is wrong and what to do, in one line."""


class BeyondPositions(UserWarning):
    """A prompt, or a prompt and its answer, takes more positions than the LLM has."""


@contextmanager
def telling_beyond_positions(say: Callable[[str], None]) -> Iterator[None]:
    """Give `say` the text of every `BeyondPositions` of the block; other warnings go where they went."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if issubclass(category, BeyondPositions):
            say(str(message))
        else:
            shown(message, category, *where, **more)

    with warnings.catch_warnings():
        warnings.simplefilter("always", BeyondPositions)
        warnings.showwarning = show
        yield


@contextmanager
def collecting_warnings() -> Iterator[list[str]]:
    """Collect the texts of the block's warnings, which are not shown; the list is filled when the block ends."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(warning.message) for warning in caught]


def closest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'visionzip'?"` for a near miss, else the list of what there is."""
    known = sorted(known)
    near = nearest(word, known)
    return f"; there are: {', '.join(known)}" if near is None else f"; did you mean {near!r}?"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the name that a word is a near miss or the initials of; `None` where no name is."""
    known = sorted(known)
    near = [name for name in known if word and _initials(name) == word]
    near += [name for name in get_close_matches(word, known, cutoff=0.6) if len(word) > SHORT or _shares(word, name)]
    return near[0] if near else None


def _initials(name: str) -> str:
    """ "lr" of "learning_rate"; nothing for one word."""
    parts = name.split("_")
    return "".join(part[:1] for part in parts) if len(parts) > 1 else ""


def _shares(word: str, name: str) -> bool:
    """Whether two thirds of the letters of the longer one are in both: "lr" has but half of "lora"."""
    word, name = word.lstrip("-"), name.lstrip("-")
    both = sum(block.size for block in SequenceMatcher(None, name, word).get_matching_blocks())
    return 3 * both >= 2 * max(len(word), len(name))


def reason(error: BaseException) -> str:
    """Why something could not be done, in one line: the message, after its kind where nobody wrote it for users."""
    said = " ".join(str(error).split())
    return said if isinstance(error, UserError) else f"failed with {type(error).__name__}: {said}"[:300]
