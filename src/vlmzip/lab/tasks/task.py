"""What is asked: questions about images, the right answers, and how answers are scored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from vlmzip.lab.tasks.metrics import Metric
from vlmzip.runtime.fingerprint import of_images


@dataclass(frozen=True)
class Sample:
    """One question."""

    id: str
    """Stays the same from run to run, and occurs once in a task."""
    image: str
    """Tells images apart: answers about the same one are not independent of each other."""
    question: str
    answers: tuple[str, ...]
    """Those that count as right; what several of them mean is the metric's."""
    load: Callable[[], Image.Image] = field(compare=False)
    """The image in RGB. Raises `UserError` where it cannot be read."""
    pixels: str
    """The digest of the image, by which one that was replaced is noticed."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """What scores are also told by, such as {"type": "count"}."""


@dataclass(frozen=True)
class CalibrationSet:
    """Images, other than the task's own, from which content-deciding methods get their thresholds."""

    about: str
    images: Callable[[], Iterable[Image.Image | str]]

    @property
    def digest(self) -> str:
        """Tells these images from those that bore their names before."""
        return of_images(self.images())


@dataclass(frozen=True)
class Task:
    name: str
    """As written after --tasks."""
    about: str
    """What it is, and what it is to the model: its own test, transfer, fine-tuned for."""
    metric: Metric
    samples: Sequence[Sample]
    max_new_tokens: int
    calibration: CalibrationSet | None = None
    uncalibrated: str = ""
    """Why there is no calibration, for the rows of methods that would need one."""
