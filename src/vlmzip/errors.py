"""Errors that the user can fix. The command line prints them as one line and exits with code 2."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import SequenceMatcher, get_close_matches
from typing import TextIO

#: The end of messages about models that lack something.
ADD_A_FAMILY = "see docs/add_a_family.md"
#: Where pip finds vlmzip.
SOURCE = "git+https://github.com/vlmzip/vlmzip"
#: Words of at most this many letters share letters with many names, so a near miss must share two thirds of them.
SHORT = 4
#: Kinds of warnings of a program that runs for long.
MOST_KINDS = 100


class UserError(ValueError):
    """Wrong input. The message gives the mistake and the remedy in one line.

    `remedy` says what to do in a few words, for a cell of a table. `advice` ends the message. A server can show
    `fact`, the message without the advice, where the advice is for the command line.
    """

    def __init__(self, message: str = "", *, remedy: str = "", advice: str = "") -> None:
        super().__init__(f"{message}; {advice}" if advice else message)
        self.fact, self.remedy = message, remedy


class UnfitMethod(UserError):
    """A method needs something that a model does not give. Other methods work with the model."""


class BudgetError(UserError):
    """A method cannot reach the budget; the message says why."""


class UnknownImage(UserError, KeyError):
    """An image that is not in a store."""

    __str__ = Exception.__str__  # that of KeyError puts quotes around the message


class Damaged(UserError):
    """A file of a store, or an image in it, whose content has changed."""


class BeyondPositions(UserWarning):
    """A warning that a prompt, with or without its answer, takes more positions than the LLM has."""


@contextmanager
def _taking_warnings(take: Callable[[str, type[Warning]], bool]) -> Iterator[None]:
    """Pass the text and category of each warning in the block to `take`. Show those for which it returns False."""
    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not take(str(message), category):
            shown(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


@contextmanager
def telling_beyond_positions(say: Callable[[str], None]) -> Iterator[None]:
    """Pass the text of every `BeyondPositions` warning in the block to `say`; other warnings are shown as before."""

    def take(text: str, category: type[Warning]) -> bool:
        is_ours = issubclass(category, BeyondPositions)
        if is_ours:
            say(text)
        return is_ours

    with _taking_warnings(take):
        warnings.simplefilter("always", BeyondPositions)
        yield


@contextmanager
def telling_once(say: Callable[[str], None]) -> Iterator[None]:
    """Pass the text of each kind of warning in the block to `say` once. Texts that differ in numbers are one kind.

    This is for programs that run for long, whose warnings would come again and again.
    """
    seen: set[str] = set()

    def take(text: str, category: type[Warning]) -> bool:
        text = " ".join(text.split())
        kind = re.sub(r"\d+", "#", text)
        if kind not in seen and len(seen) < MOST_KINDS:
            seen.add(kind)
            say(text)
        return True

    with _taking_warnings(take):
        yield


@contextmanager
def collecting_warnings() -> Iterator[list[str]]:
    """Collect the texts of the block's warnings, which are not shown; the list is filled when the block ends."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(warning.message) for warning in caught]


def how_to_install(extra: str) -> str:
    """Return the command that installs vlmzip with an extra."""
    return f'pip install "vlmzip[{extra}] @ {SOURCE}"'


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise `UserError` if a value is not one of its choices."""
    names = list(map(str, choices))
    if str(value) not in names:
        raise UserError(f"{name} must be {alternatives(names)}, got {value!r}{did_you_mean(str(value), names)}")


def refuse_unknown(where: str, content: Iterable[object], known: Iterable[str]) -> None:
    """Raise `UserError` for a key that is not `known`; the message has the closest one."""
    known = list(known)
    for key in content:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{closest(str(key), known)}")


def alternatives(names: Sequence[str]) -> str:
    """Return names as a sentence has them: "a, b or c"."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def counted(count: float, noun: str) -> str:
    """Return a number with its noun, such as "1 image" or "1,000 images"."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun}{'' if count == 1 else 's'}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'visionzip'?"` for a near miss, else nothing."""
    near = nearest(word, known)
    return "" if near is None else f"; did you mean {near!r}?"


def closest(word: str, known: Iterable[str]) -> str:
    """Return the end of a message: "; did you mean 'visionzip'?" for a near miss, else "; choose one of …"."""
    known = sorted(known)
    return did_you_mean(word, known) or f"; choose one of {', '.join(known)}"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known name that `word` misspells or abbreviates by its initials, or `None`."""
    known = sorted(known)
    near = [name for name in known if word and _initials(name) == word]
    near += [name for name in get_close_matches(word, known, cutoff=0.6) if len(word) > SHORT or _shares(word, name)]
    return near[0] if near else None


def _initials(name: str) -> str:
    """Return the initials of a name, such as "lr" for "learning_rate"; empty for a single word."""
    parts = name.split("_")
    return "".join(part[:1] for part in parts) if len(parts) > 1 else ""


def _shares(word: str, name: str) -> bool:
    """Return whether both share two thirds of the longer one's letters, in order: "lr" has only half of "lora"."""
    word, name = word.lstrip("-"), name.lstrip("-")
    both = sum(block.size for block in SequenceMatcher(None, name, word).get_matching_blocks())
    return 3 * both >= 2 * max(len(word), len(name))


def reason(error: BaseException) -> str:
    """Return an error's message on one line.

    For errors that are not a `UserError`, put the type before it, and cut the text at 300 characters.
    """
    message = " ".join(str(error).split())
    return message if isinstance(error, UserError) else f"failed with {type(error).__name__}: {message}"[:300]


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn every error of a library in the block into a `UserError` that begins with `what`.

    The block must only call libraries: a defect of vlmzip must still show as a traceback.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # Panics of the tokenizers library, which is written in Rust, are not an `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: {reason(error)}") from error
