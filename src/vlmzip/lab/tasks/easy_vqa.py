"""easy-VQA, from the package of that name: 9,673 questions about 1,000 images of one shape each (64 x 64 pixels).

Source: github.com/vzhou842/easy-VQA, MIT licence. There are 13 answers, most of them yes or no. Answering always yes is
right in 37 % of the questions. For a model that was not trained on it, the task is transfer (mini, for example, knows
neither "rectangle" nor "teal").
"""

from __future__ import annotations

from collections import Counter
from functools import cache, partial
from types import ModuleType

from vlmzip.errors import UserError, how_to_install
from vlmzip.lab.tasks.metrics import METRICS
from vlmzip.lab.tasks.task import CalibrationSet, Sample, Task
from vlmzip.runtime.fingerprint import of_image
from vlmzip.runtime.images import load_image

NAME = "easy-vqa"
RELATIONS = {
    "transfer": "the model was not trained on it",
    "tuned": "the model was fine-tuned on its training split, as the user says",
}
#: Number of images to calibrate on: the first of the 4,000 training images.
CALIBRATE_ON = 200


def easy_vqa_task(limit: int | None, relation: str) -> Task:
    """Return the test split. Raise `UserError` if the package is not installed."""
    package = _package()
    paths = package.get_test_image_paths()
    seen: Counter[int] = Counter()
    pixels = cache(lambda image: of_image(load_image(paths[image])))
    samples = []
    for question, answer, image in list(zip(*package.get_test_questions(), strict=True))[:limit]:
        samples.append(
            Sample(
                id=f"{image}-{seen[image]}",
                image=str(image),
                question=question,
                answers=(answer,),
                load=partial(load_image, paths[image]),
                pixels=pixels(image),
                groups={"type": _type(question, answer)},
            )
        )
        seen[image] += 1
    return Task(
        name=f"{NAME}:{relation}",
        title="questions of easy-VQA's test split",
        about=f"easy-VQA's test split; {relation}: {RELATIONS[relation]}",
        metric=METRICS["exact"],
        samples=samples,
        max_new_tokens=8,
        calibration=CalibrationSet(f"easy-VQA's first {CALIBRATE_ON} training images", partial(_training, package)),
    )


def _package() -> ModuleType:
    try:
        import easy_vqa
    except ImportError:
        raise UserError(f"the task easy-vqa needs its package: {how_to_install('eval')}") from None
    return easy_vqa


def _training(package: ModuleType) -> list[str]:
    paths = package.get_train_image_paths()
    return [paths[number] for number in sorted(paths)[:CALIBRATE_ON]]


def _type(question: str, answer: str) -> str:
    if answer in ("yes", "no"):
        return "denied" if {"not", "no"} & set(question.split()) else "asserted"
    return "color" if "color" in question else "shape"
