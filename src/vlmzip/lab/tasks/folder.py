"""Questions of one's own: a JSONL file, one object a line, beside the images that it names.

    {"image": "street.jpg", "question": "What does the sign say?", "answers": ["stop"], "type": "reading"}

`answers` is a list, or one text; `id` (default: the line's number) and `type` can be left out. Everything is read and
every image is decoded before the model is loaded: a broken one ends the command at once, with its name, since a
question left out in silence would change the score.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

from vlmzip.errors import UserError, closest
from vlmzip.files import is_folder, is_there
from vlmzip.json_text import JsonError, parse, read_lines
from vlmzip.lab.tasks.metrics import METRICS, Metric
from vlmzip.lab.tasks.task import CalibrationSet, Sample, Task
from vlmzip.runtime.fingerprint import of_image
from vlmzip.runtime.images import load_image

FIELDS = ("image", "question", "answers", "id", "type")
UNCALIBRATED = "its threshold has to be set from images that are not asked about: name them, --calibrate-on FOLDER"


def folder_task(place: str, metric: str, limit: int | None, calibrate_on: str | None) -> Task:
    """The questions of a JSONL file, or of the only one in a folder.

    Raises `UserError` naming file and line for what cannot be read, and for images that cannot be read.
    """
    path, how = _questions_file(Path(place)), METRICS[metric]
    samples = _read(path, how)[:limit]
    if not samples:
        raise UserError(f"there is no question in {str(path)!r}")
    pixels = check_images(samples)
    samples = [replace(sample, pixels=pixels[sample.image]) for sample in samples]
    return Task(
        name=place,
        about=f"{len(samples):,} questions of {path.name}",
        metric=how,
        samples=samples,
        max_new_tokens=16,
        calibration=calibration_on(calibrate_on, samples) if calibrate_on else None,
        uncalibrated=UNCALIBRATED,
    )


def check_images(samples: Sequence[Sample]) -> dict[str, str]:
    """Decodes every image once, and returns its digest.

    Raises `UserError` with how many cannot be read, and why the first cannot.
    """
    pixels: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for image, load in {sample.image: sample.load for sample in samples}.items():
        try:
            pixels[image] = of_image(load())
        except UserError as error:
            wrong[image] = str(error)
    if wrong:
        all_of = len({sample.image for sample in samples})
        first = next(iter(wrong.values()))
        raise UserError(f"{len(wrong)} of {all_of} images cannot be read; the first: {first}")
    return pixels


def _questions_file(place: Path) -> Path:
    if not is_there(place):
        raise UserError(f"there is no file or folder {str(place)!r}")
    if not is_folder(place):
        return place
    found = sorted(place.glob("*.jsonl"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{str(place)!r} should hold one .jsonl file with the questions, there are: {names}")
    return found[0]


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
        raise UserError("this is no object with image, question and answers")
    if unknown := [name for name in content if name not in FIELDS]:
        raise UserError(f"there is no field {unknown[0]!r}{closest(unknown[0], FIELDS)}")
    if missing := [name for name in FIELDS[:3] if name not in content]:
        raise UserError(f"the field {missing[0]!r} is missing")
    answers = content["answers"] if isinstance(content["answers"], list) else [content["answers"]]
    answers = [str(answer) if isinstance(answer, int | float) else answer for answer in answers]
    if not answers or not all(isinstance(text, str) for text in (content["image"], content["question"], *answers)):
        raise UserError("image and question are texts, answers is a list of texts")
    if wrong := [name for name in ("id", "type") if not isinstance(content.get(name, ""), str | int | float)]:
        raise UserError(f"{wrong[0]} is a text or a number")
    if reason := metric.unfit(answers):
        raise UserError(reason)
    path = folder / content["image"]
    return Sample(
        id=str(content.get("id", number)),
        image=str(path),
        question=content["question"],
        answers=tuple(answers),
        load=partial(load_image, path),
        pixels="",  # known when all have been decoded
        groups={"type": str(content["type"])} if "type" in content else {},
    )


def calibration_on(folder: str, samples: Sequence[Sample]) -> CalibrationSet:
    """The images of a folder. Raises `UserError` where there are none, or some that `samples` ask about."""
    if not is_folder(folder):
        raise UserError(f"--calibrate-on {folder!r} is no folder of images")
    known = Image.registered_extensions()
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in known)
    if not paths:
        raise UserError(f"there is no image in the folder {folder!r} (subfolders are not searched)")
    asked = {os.path.realpath(sample.image) for sample in samples}
    if shared := [path for path in paths if os.path.realpath(path) in asked]:
        raise UserError(f"--calibrate-on {folder!r} holds images that are asked about, {shared[0].name} for one")
    return CalibrationSet(f"the {len(paths)} images of {folder}", lambda: map(str, paths))
