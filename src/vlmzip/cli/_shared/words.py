"""Split the arguments `IMAGE|VIDEO… QUESTION`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vlmzip.errors import UserError
from vlmzip.files import is_file
from vlmzip.runtime.videos import is_video


def split_images_and_question(words: list[str], command: str) -> tuple[list[str], str]:
    """Return the paths of images and videos, and the question: the last word. Raise `UserError` without both."""
    *paths, question = words
    kind = "a video" if is_video(question) else "an image"
    is_visual = is_video(question) or Path(question).suffix.lower() in Image.registered_extensions()
    if not paths:
        if is_visual:
            raise UserError(f'there is {kind} but no question; try: vlmzip {command} {question} "What is there?"')
        raise UserError(f'give at least one image before the question: vlmzip {command} image.png "What is there?"')
    if is_visual or is_file(question):
        raise UserError(f"the last word is the question, but {question!r} is {kind}: add a question after it")
    if not question.strip():
        raise UserError("the question is empty")
    return paths, question
