"""VQA accuracy: the share of annotators who gave the same answer, after normalization.

It follows the VQA challenge's published evaluation (github.com/GT-Vision-Lab/VQA, vqaEval.py) with one difference:
answers are always normalized, as on the challenge's server. The published code does not normalize them if all
annotators agree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

#: The number of other annotators with the same answer that gives the full score.
AGREEING = 3

_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_WITHOUT_ONE_APOSTROPHE = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, character in enumerate(word)
    if character == "'"
}
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,+\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


def vqa_accuracy(given: str, answers: Sequence[str]) -> float:
    """Return the mean over annotators of min(1, number of the *other* annotators with the given answer / 3)."""
    normalized, others = vqa_form(given), [vqa_form(answer) for answer in answers]
    same = others.count(normalized)
    marks = [min(1.0, (same - (other == normalized)) / AGREEING) for other in others]
    return sum(marks) / len(marks)


def vqa_form(answer: str) -> str:
    """Normalize an answer: lower case, no punctuation or articles, digits for numbers up to ten, full contractions."""
    words = _without_marks(" ".join(answer.split())).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_WITHOUT_ONE_APOSTROPHE.get(word, word) for word in words if word not in _ARTICLES)


def _without_marks(text: str) -> str:
    """Remove punctuation marks next to a space, and replace others by a space.

    In a text with a number such as 1,000, remove all marks.
    """
    grouped = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or grouped else " ")
    return _FULL_STOP.sub("", out)
