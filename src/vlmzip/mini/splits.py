"""The splits: the seeds of their images, and the questions of the fixed splits.

An image is drawn from its seed, and the ranges of seeds below do not overlap. The splits also use different photos (see
`assets`).
"""

from functools import cache

from PIL import Image

from vlmzip.mini.assets import Assets, shipped_assets
from vlmzip.mini.drawing import draw
from vlmzip.mini.questions import ImageQuestion, Question, ask_all
from vlmzip.mini.rng import Rng
from vlmzip.mini.scene import Scene, make_scene

VALIDATION = range(1_000_000, 1_000_180)
TEST = range(2_000_000, 2_000_570)
EXAMPLES = range(3_000_000, 3_001_000)
TRAIN_ENCODER = range(10_000_000, 50_000_000)
TRAIN_LANGUAGE = range(50_000_000, 90_000_000)
QUESTIONS_PER_IMAGE = 6
# Indices into words.LEVELS. Half of the training images are cluttered, because they have more things to learn from.
TRAIN_LEVELS = (0, 2, 1, 2)


def train_seed(seeds: range, index: int) -> int:
    """Return the seed of the index-th training image of a range."""
    return seeds.start + 3 * index + (TRAIN_LEVELS[index % len(TRAIN_LEVELS)] - seeds.start) % 3


def questions_of(scene: Scene, most: int = QUESTIONS_PER_IMAGE) -> list[Question]:
    """Return the questions about an image, each of a different type. The same seed gives the same questions."""
    return ask_all(scene, Rng(scene.seed * 2 + 2_000_003), most)


def samples(seeds: range, assets: Assets, limit: int | None = None) -> list[ImageQuestion]:
    """Return all questions about the images of the seeds, or the first `limit` of them."""
    questions: list[ImageQuestion] = []
    for seed in seeds:
        if limit is not None and len(questions) >= limit:
            break
        scene = make_scene(seed)
        image = Image.fromarray(draw(scene, assets))
        for question in questions_of(scene):
            questions.append(ImageQuestion(seed, image, question.text, question.answer, question.type, scene.level))
    return questions[:limit]


@cache
def _fixed(part: str) -> tuple[ImageQuestion, ...]:
    return tuple(samples({"validation": VALIDATION, "test": TEST}[part], shipped_assets(part)))


def validation_split(limit: int | None = None) -> list[ImageQuestion]:
    """Return the validation questions, for choices during training and tuning."""
    return list(_fixed("validation")[:limit])


def test_split(limit: int | None = None) -> list[ImageQuestion]:  # noqa: PT028
    """Return the test questions, for reporting only."""
    return list(_fixed("test")[:limit])
