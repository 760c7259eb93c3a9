"""A task: questions about images, the right answers, and a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

from vlmzip.lab.tasks.metrics import Metric
from vlmzip.runtime.fingerprint import of_images


@dataclass(frozen=True)
class Sample:
    """A question about an image."""

    id: str
    """A name that is unique in the task and stays the same from run to run."""
    image: str
    """A name of the image. Answers about the same image are not independent of each other."""
    question: str
    answers: tuple[str, ...]
    """The right answers. The metric defines what several answers mean."""
    load: Callable[[], Image.Image] = field(compare=False)
    """Return the image in RGB. Raise `UserError` if it cannot be read."""
    pixels: str
    """The digest of the image, which detects a replaced image."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """The groups for which scores are reported, such as {"type": "count"}."""


@dataclass(frozen=True)
class CalibrationSet:
    """Images, different from the task's, that set the thresholds of methods such as DFMR."""

    about: str
    images: Callable[[], Iterable[Image.Image | str]]

    @property
    def digest(self) -> str:
        """Return a digest of the images, which detects replaced ones."""
        return of_images(self.images())


@dataclass(frozen=True)
class Task:
    """Questions about images, with a metric."""

    name: str
    """The task as written for `--tasks`."""
    about: str
    """A description, and the task's relation to the model: its own test split, transfer, or fine-tuned."""
    metric: Metric
    samples: Sequence[Sample]
    max_new_tokens: int
    calibration: CalibrationSet | None = None
    uncalibrated: str = ""
    """Why there is no calibration set, for the rows of methods that need one."""
    title: str = ""
    """The task's questions in words, for the titles of plots, such as "questions of mini's test split"."""
