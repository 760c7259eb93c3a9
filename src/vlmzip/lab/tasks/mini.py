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
    """All 3,414 questions, or the first `limit`."""
    asked = test_split() if limit is None else samples(TEST, shipped_assets("test"), limit)
    return Task(
        name=NAME,
        about="mini's test split: images and photos that mini has not seen",
        metric=METRICS["exact"],
        samples=[
            Sample(
                id=f"{one.seed}-{one.type}",  # an image is asked once about each type
                image=str(one.seed),
                question=one.question,
                answers=(one.answer,),
                load=partial(Image.Image.copy, one.image),
                pixels=of_image(one.image),
                groups={"type": one.type, "level": one.level},
            )
            for one in asked
        ],
        max_new_tokens=MOST_NEW_TOKENS,
        calibration=CalibrationSet(f"mini's {len(VALIDATION)} validation images", _validation_images),
    )


def _validation_images() -> Iterator[Image.Image]:
    assets = shipped_assets("validation")
    return (Image.fromarray(draw(make_scene(seed), assets)) for seed in VALIDATION)
