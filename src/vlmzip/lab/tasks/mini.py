"""mini's own test split, by type of question and by complexity of the image."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from PIL import Image

from vlmzip.lab.tasks.metrics import METRICS
from vlmzip.lab.tasks.task import CalibrationSet, Sample, Task
from vlmzip.mini.assets import shipped_assets
from vlmzip.mini.drawing import draw
from vlmzip.mini.questions import MOST_NEW_TOKENS
from vlmzip.mini.scene import make_scene
from vlmzip.mini.splits import TEST, VALIDATION, samples, test_split
from vlmzip.runtime.fingerprint import of_image

NAME = "mini"


def mini_task(limit: int | None) -> Task:
    """Return the task with all 3,414 questions, or with the first `limit`."""
    questions = test_split() if limit is None else samples(TEST, shipped_assets("test"), limit)
    return Task(
        name=NAME,
        title="questions of mini's test split",
        about="mini's test split: images and photos that mini has not seen",
        metric=METRICS["exact"],
        samples=[
            Sample(
                id=f"{question.seed}-{question.type}",  # an image has at most one question of each type
                image=str(question.seed),
                question=question.question,
                answers=(question.answer,),
                load=partial(Image.Image.copy, question.image),
                pixels=of_image(question.image),
                groups={"type": question.type, "level": question.level},
            )
            for question in questions
        ],
        max_new_tokens=MOST_NEW_TOKENS,
        calibration=CalibrationSet(f"mini's {len(VALIDATION)} validation images", _validation_images),
    )


def _validation_images() -> Iterator[Image.Image]:
    assets = shipped_assets("validation")
    return (Image.fromarray(draw(make_scene(seed), assets)) for seed in VALIDATION)
