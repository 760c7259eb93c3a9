"""Metrics: a score from 0 to 1 for each answer, and further numbers for a whole task, such as F1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from vlmzip.lab.tasks.vqa_accuracy import vqa_accuracy
from vlmzip.mini.words import normalized

#: The relative error that relaxed accuracy allows (ChartQA, arXiv:2203.10244, section 5.1).
RELAXED = 0.05

#: A numerator and a denominator. The share of a task is the sum of the numerators over the sum of the denominators.
Share = tuple[float, float]


@dataclass(frozen=True)
class Metric:
    """A way to score answers."""

    name: str
    about: str
    score: Callable[[str, Sequence[str]], float]
    """Score a given answer against the reference answers."""
    unfit: Callable[[Sequence[str]], str] = field(default=lambda answers: "")
    """Return why the metric cannot use these reference answers, or ""."""
    shares: Mapping[str, Callable[[str, Sequence[str]], Share]] = field(default_factory=dict)
    """Numbers of a whole task that are not means of scores, by name. F1 is a share of sums over the task."""


def exact(given: str, answers: Sequence[str]) -> float:
    """Return 1 if the answer equals a reference answer except for case, spaces and a full stop at the end, else 0."""
    return float(normalized(given) in map(normalized, answers))


def relaxed(given: str, answers: Sequence[str]) -> float:
    """Return 1 for a number within 5 % of a reference (50% is 0.5), or for equal text except for case, else 0."""
    return float(any(_relaxed(given.strip(), answer.strip()) for answer in answers))


def _relaxed(given: str, answer: str) -> bool:
    value, right = _number(given), _number(answer)
    if value is None or not right:  # no relative error from 0: compare as text, as the published codes do
        return given.lower() == answer.lower()
    return abs(value - right) / abs(right) <= RELAXED


def _number(text: str) -> float | None:
    try:
        return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def yes_or_no(answer: str) -> str:
    """Return "no" if the first sentence has the word no or not, else "yes" if it has the word yes, else ""."""
    words = answer.lower().split(".")[0].replace(",", " ").split()
    words = [word.strip("!?;:\"'()") for word in words]
    return "no" if {"no", "not"} & set(words) else "yes" if "yes" in words else ""


def says_right(given: str, answers: Sequence[str]) -> float:
    """Return 1 for the right one of yes and no, else 0. Other answers are wrong; POPE's own code counts them as yes."""
    return float(yes_or_no(given) == yes_or_no(answers[0]))


def f1(given: str, answers: Sequence[str]) -> Share:
    """Return the F1 score of "yes" as a share: 2 TP / (2 TP + FP + FN)."""
    yes, right = yes_or_no(given) == "yes", yes_or_no(answers[0]) == "yes"
    return 2.0 * (yes and right), float(yes) + float(right)


def _too_few(answers: Sequence[str]) -> str:
    return "" if len(answers) > 3 else f"VQA accuracy needs the answers of at least 4 people, got {len(answers)}"


def _not_yes_or_no(answers: Sequence[str]) -> str:
    fits = len(answers) == 1 and normalized(answers[0]) in ("yes", "no")
    return "" if fits else f"yesno needs one answer, yes or no, got {list(answers)}"


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact", "exact match but for case, spaces and a full stop", exact),
        Metric("vqa", "VQA accuracy (VQA challenge)", vqa_accuracy, _too_few),
        Metric("relaxed", "relaxed accuracy, numbers within 5 % (ChartQA)", relaxed),
        Metric("yesno", "accuracy of yes and no, and F1 of yes", says_right, _not_yes_or_no, {"F1": f1}),
    )
}
