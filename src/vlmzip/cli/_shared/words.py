"""Split the arguments `IMAGE… QUESTION`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vlmzip.errors import UserError
from vlmzip.files import is_file


def split_images_and_question(words: list[str], command: str) -> tuple[list[str], str]:
    """Return the image paths and the question, which is the last word. Raise `UserError` if one of them is missing."""
    *paths, question = words
    if not paths:
        if Path(question).suffix.lower() in Image.registered_extensions():
            raise UserError(f'there is an image but no question; try: vlmzip {command} {question} "What is there?"')
        raise UserError(f'give at least one image before the question: vlmzip {command} image.png "What is there?"')
    if is_file(question) or Path(question).suffix.lower() in Image.registered_extensions():
        raise UserError(f"the last word is the question, but {question!r} is an image: add a question after it")
    if not question.strip():
        raise UserError("the question is empty")
    return paths, question
