"""How an answer is scored: from 0 to 1 for each question, and what a whole task has beside the mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vlmzip.lab.tasks.vqa_accuracy import vqa_accuracy
from vlmzip.mini.words import normalized

#: Relative error that relaxed accuracy forgives (ChartQA, arXiv:2203.10244, section 5.1).
RELAXED = 0.05

#: A share over a task is the sum of the first numbers by the sum of the second ones.
Share = tuple[float, float]


@dataclass(frozen=True)
class Metric:
    """A way to score answers."""

    name: str
    about: str
    score: Callable[[str, Sequence[str]], float]
    """The score of a given answer against those that count as right."""
    unfit: Callable[[Sequence[str]], str] = field(default=lambda answers: "")
    """Why these reference answers cannot be scored against; empty where they can."""
    shares: Mapping[str, Callable[[str, Sequence[str]], Share]] = field(default_factory=dict)
    """What is not a mean of scores, by name: F1 is a share whose terms are sums over the task."""


def exact(given: str, answers: Sequence[str]) -> float:
    """1 where the answer is one of the right ones but for case, spaces and a full stop at the end."""
    return float(normalized(given) in map(normalized, answers))


def relaxed(given: str, answers: Sequence[str]) -> float:
    """1 where a number is within 5 % of a right one (50% is 0.5), or a text is the same but for case."""
    return float(any(_relaxed(given.strip(), answer.strip()) for answer in answers))


def _relaxed(given: str, answer: str) -> bool:
    said, right = _number(given), _number(answer)
    if said is None or not right:  # nothing is near 0 in proportion: compared as text, as the published codes do
        return given.lower() == answer.lower()
    return abs(said - right) / abs(right) <= RELAXED


def _number(text: str) -> float | None:
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def yes_or_no(answer: str) -> str:
    """What the first sentence says: "no" where it has a no or not, else "yes" where it has a yes, else nothing."""
    words = answer.lower().split(".")[0].replace(",", " ").split()
    words = [word.strip("!?;:\"'()") for word in words]
    return "no" if {"no", "not"} & set(words) else "yes" if "yes" in words else ""


def says_right(given: str, answers: Sequence[str]) -> float:
    """1 where yes or no is said, and rightly. Other answers are wrong, where POPE's own code takes them for yes."""
    return float(yes_or_no(given) == yes_or_no(answers[0]))


def f1(given: str, answers: Sequence[str]) -> Share:
    """F1 of "yes": 2 TP / (2 TP + FP + FN)."""
    said, right = yes_or_no(given) == "yes", yes_or_no(answers[0]) == "yes"
    return 2.0 * (said and right), float(said) + float(right)


def _too_few(answers: Sequence[str]) -> str:
    return "" if len(answers) > 3 else f"VQA accuracy needs the answers of 4 people or more, here are {len(answers)}"


def _not_yes_or_no(answers: Sequence[str]) -> str:
    one = len(answers) == 1 and normalized(answers[0]) in ("yes", "no")
    return "" if one else f"yesno needs one answer, yes or no, not {list(answers)}"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact", "exact match but for case, spaces and a full stop", exact),
        Metric("vqa", "VQA accuracy (VQA challenge)", vqa_accuracy, _too_few),
        Metric("relaxed", "relaxed accuracy, numbers within 5 % (ChartQA)", relaxed),
        Metric("yesno", "accuracy of yes and no, and F1 of yes", says_right, _not_yes_or_no, {"F1": f1}),
    )
}
