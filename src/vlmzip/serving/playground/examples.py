"""Examples on the page, handed over by the command that starts the server."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Example:
    """An image with a question about it."""

    image: Image.Image
    question: str
