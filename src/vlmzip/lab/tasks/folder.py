"""The user's own questions: a JSONL file with one object per line, next to the images that it names.

    {"image": "street.jpg", "question": "What does the sign say?", "answers": ["stop"], "type": "reading"}

`answers` is a list of texts or one text. `id` (default: the line number) and `type` are optional. All questions are
read and all images decoded before the model is loaded. A broken image ends the command with an error that names it: to
skip its questions silently would change the score.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from vlmzip.errors import UserError, closest
from vlmzip.files import is_folder, is_there
from vlmzip.json_text import JsonError, parse, read_lines
from vlmzip.lab.tasks.metrics import METRICS, Metric
from vlmzip.lab.tasks.task import CalibrationSet, Sample, Task
from vlmzip.runtime.fingerprint import of_image
from vlmzip.runtime.images import common_suffixes, load_image

FIELDS = ("image", "question", "answers", "id", "type")
UNCALIBRATED = "its threshold must be set from images without questions in the task; give --calibrate-on FOLDER"


def folder_task(place: str, metric: str, limit: int | None, calibrate_on: str | None) -> Task:
    """Return the task of a JSONL file, or of the only JSONL file in a folder.

    Raise `UserError` with file and line for an invalid question, and for images that cannot be read.
    """
    path, scoring = _questions_file(Path(place)), METRICS[metric]
    samples = _read(path, scoring)[:limit]
    if not samples:
        raise UserError(f"there is no question in {str(path)!r}")
    pixels = check_images(samples)
    samples = [replace(sample, pixels=pixels[sample.image]) for sample in samples]
    return Task(
        name=place,
        title=f"questions of {Path(place).name}",
        about=f"{len(samples):,} questions of {path.name}",
        metric=scoring,
        samples=samples,
        max_new_tokens=16,
        calibration=calibration_on(calibrate_on, samples) if calibrate_on else None,
        uncalibrated=UNCALIBRATED,
    )


def check_images(samples: Sequence[Sample]) -> dict[str, str]:
    """Decode every image once and return the digests, by image.

    Raise `UserError` with the number of images that cannot be read and the reason for the first one.
    """
    pixels: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for image, load in {sample.image: sample.load for sample in samples}.items():
        try:
            pixels[image] = of_image(load())
        except UserError as error:
            wrong[image] = str(error)
    if wrong:
        images = len({sample.image for sample in samples})
        first = next(iter(wrong.values()))
        raise UserError(f"{len(wrong)} of {images} images cannot be read; the first: {first}")
    return pixels


def _questions_file(place: Path) -> Path:
    if not is_there(place):
        raise UserError(f"there is no file or folder {str(place)!r}")
    if not is_folder(place):
        return place
    files = sorted(place.glob("*.jsonl"))
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise UserError(f"{str(place)!r} must have one .jsonl file with the questions, found {names}")
    return files[0]


def _read(path: Path, metric: Metric) -> list[Sample]:
    samples: dict[str, Sample] = {}
    for line in read_lines(path):
        try:
            sample = _sample(path.parent, line.number, parse(line.text), metric)
            if sample.id in samples:
                raise UserError(f"the id {sample.id!r} occurs twice")
        except (JsonError, UserError) as error:
            raise UserError(f"{path}:{line.number}: {error}") from None
        samples[sample.id] = sample
    return list(samples.values())


def _sample(folder: Path, number: int, content: object, metric: Metric) -> Sample:
    if not isinstance(content, dict):
        raise UserError("a line must be a JSON object with image, question and answers")
    if unknown := [name for name in content if name not in FIELDS]:
        raise UserError(f"unknown field {unknown[0]!r}{closest(unknown[0], FIELDS)}")
    if missing := [name for name in FIELDS[:3] if name not in content]:
        raise UserError(f"the field {missing[0]!r} is missing")
    answers = content["answers"] if isinstance(content["answers"], list) else [content["answers"]]
    answers = [str(answer) if isinstance(answer, int | float) else answer for answer in answers]
    if not answers or not all(isinstance(text, str) for text in (content["image"], content["question"], *answers)):
        raise UserError("image and question must be texts, and answers a list of texts")
    if wrong := [name for name in ("id", "type") if not isinstance(content.get(name, ""), str | int | float)]:
        raise UserError(f"{wrong[0]} must be a text or a number")
    if reason := metric.unfit(answers):
        raise UserError(reason)
    path = folder / content["image"]
    return Sample(
        id=str(content.get("id", number)),
        image=str(path),
        question=content["question"],
        answers=tuple(answers),
        load=partial(load_image, path),
        pixels="",  # set after all images have been decoded
        groups={"type": str(content["type"])} if "type" in content else {},
    )


def calibration_on(folder: str, samples: Sequence[Sample]) -> CalibrationSet:
    """Return the images of a folder. Raise `UserError` if there are none, or if `samples` ask about one of them."""
    if not is_folder(folder):
        raise UserError(f"--calibrate-on must be a folder of images, got {folder!r}")
    known = common_suffixes()
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in known)
    if not paths:
        raise UserError(f"there is no image in the folder {folder!r} (subfolders are not searched)")
    asked = {os.path.realpath(sample.image) for sample in samples}
    if shared := [path for path in paths if os.path.realpath(path) in asked]:
        raise UserError(f"--calibrate-on {folder!r} has images with questions in the task, such as {shared[0].name}")
    return CalibrationSet(f"the {len(paths)} images of {folder}", lambda: map(str, paths))
