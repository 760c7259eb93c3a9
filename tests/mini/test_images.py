"""Images and questions are equal on every machine, balanced, and have answers that match the drawing."""

import hashlib
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest

from vlmzip.mini.assets import SHIPPED, shipped_assets
from vlmzip.mini.drawing import draw
from vlmzip.mini.questions import ask, ask_all
from vlmzip.mini.rng import Rng
from vlmzip.mini.scene import SIDE, Scene, Thing, make_scene
from vlmzip.mini.splits import (
    EXAMPLES,
    TEST,
    TRAIN_ENCODER,
    TRAIN_LANGUAGE,
    VALIDATION,
    questions_of,
    test_split,
    train_seed,
    validation_split,
)
from vlmzip.mini.words import COLORS, ITEMS, LEVELS, PLURALS, RELATIONS, SHAPES, TYPES

test_split.__test__ = False  # type: ignore[attr-defined]  # its name looks like a test's
SCENES = [make_scene(seed) for seed in range(600)]
PATCH = 8


def test_images_of_the_test_split_have_not_changed() -> None:
    digest = hashlib.sha256()
    for seed in TEST[:30]:
        digest.update(draw(make_scene(seed), shipped_assets("test")).tobytes())
    assert digest.hexdigest() == IMAGES_DIGEST


def test_questions_of_the_fixed_splits_have_not_changed() -> None:
    digest = hashlib.sha256()
    for split in (validation_split(), test_split()):
        for sample in split:
            line = f"{sample.seed}|{sample.type}|{sample.level}|{sample.question}|{sample.answer}\n"
            digest.update(line.encode())
    assert digest.hexdigest() == QUESTIONS_DIGEST


def test_splits_share_no_seed() -> None:
    ranges = [VALIDATION, TEST, EXAMPLES, TRAIN_ENCODER, TRAIN_LANGUAGE]
    ordered = sorted(ranges, key=lambda seeds: seeds.start)
    for earlier, later in pairwise(ordered):
        assert earlier.stop <= later.start


@pytest.mark.parametrize("seeds", [TRAIN_ENCODER, TRAIN_LANGUAGE])
def test_training_seeds_stay_in_their_range_and_never_repeat(seeds: range) -> None:
    first = [train_seed(seeds, index) for index in range(1000)]
    assert len(set(first)) == len(first)
    assert all(seed in seeds for seed in first)
    # The shipped run draws fewer images than this.
    assert train_seed(seeds, 400_000) in seeds


def test_the_splits_share_no_photo_crop_and_no_item() -> None:
    validation, test = shipped_assets("validation"), shipped_assets("test")
    for name in ITEMS:
        assert not _crops(validation.items[name]) & _crops(test.items[name])
    assert not _crops(validation.grounds) & _crops(test.grounds)


def _crops(stack: np.ndarray) -> set[bytes]:
    return {crop.tobytes() for crop in stack}


def test_shipped_crops_are_small() -> None:
    assert SHIPPED.stat().st_size < 2_000_000


def test_the_test_split_is_large_and_even() -> None:
    split = test_split()
    assert len(split) >= 3000
    assert min(Counter(sample.type for sample in split).values()) >= 250
    assert min(Counter(sample.level for sample in split).values()) >= 900
    assert {sample.type for sample in split} == set(TYPES)
    assert {sample.level for sample in split} == set(LEVELS)


def test_limit_gives_the_first_samples() -> None:
    assert [sample.question for sample in test_split(7)] == [sample.question for sample in test_split()[:7]]


@pytest.mark.parametrize(
    ("question_type", "most"),
    [
        ("exist", 0.55),
        ("count", 0.25),
        ("color", 0.20),
        ("shape", 0.24),
        ("where", 0.32),
        ("relation", 0.32),
        ("read", 0.08),
        ("item", 0.20),
        ("kind", 0.42),
    ],
)
def test_no_answer_is_much_more_frequent_than_the_others(question_type: str, most: float) -> None:
    answers = Counter(sample.answer for sample in test_split() if sample.type == question_type)
    assert max(answers.values()) / sum(answers.values()) < most


def test_answers_have_one_to_three_words() -> None:
    assert all(1 <= len(sample.answer.split()) <= 3 for sample in test_split())


def test_things_lie_inside_and_apart() -> None:
    for scene in SCENES:
        for number, thing in enumerate(scene.things):
            assert thing.left >= 0
            assert thing.top >= 0
            assert thing.left + thing.width <= SIDE
            assert thing.top + thing.height <= SIDE
            assert not any(thing.near(other) for other in scene.things[number + 1 :])


def test_things_do_not_line_up_with_patches_or_pooling_windows() -> None:
    for window in (PATCH, 2 * PATCH, 3 * PATCH):
        offsets = Counter(int(thing.center[0]) % window for scene in SCENES for thing in scene.things)
        assert len(offsets) == window
        assert max(offsets.values()) < 2.0 * sum(offsets.values()) / window


def test_several_things_often_share_a_pooling_window() -> None:
    crowded = 0
    for scene in SCENES:
        windows = Counter((int(x) // 24, int(y) // 24) for x, y in (thing.center for thing in scene.things))
        crowded += max(windows.values()) >= 2
    assert crowded > len(SCENES) * 0.6


def test_ground_gets_busier_level_by_level() -> None:
    assets = shipped_assets("validation")
    spread = defaultdict(list)
    for scene in SCENES[:90]:
        image = draw(scene, assets).astype(float).mean(-1)
        patches = image.reshape(12, 8, 12, 8).transpose(0, 2, 1, 3).reshape(144, 64)
        spread[scene.level].append((patches.std(1) > 4).mean())
    busy = [float(np.mean(spread[level])) for level in LEVELS]
    assert busy[0] < 0.4 < 0.7 < busy[2]
    assert busy[0] < busy[1] < busy[2]


# ---------------------------------------------------------------- answers, found again by another way


def _things(scene: Scene, words: str) -> list[Thing]:
    """Return the things that 'red circle', 'circles', 'number' or 'blue shapes' can mean."""
    singular = {plural: name for name, plural in PLURALS.items()}
    kept = list(scene.things)
    for word in words.split():
        word = singular.get(word, word)
        if word in COLORS:
            kept = [thing for thing in kept if thing.color == word]
        elif word in SHAPES or word in ITEMS:
            kept = [thing for thing in kept if thing.name == word]
        elif word in ("shape", "shapes", "number", "item"):
            kept = [thing for thing in kept if thing.kind == word.rstrip("s")]
        else:
            assert word in ("a", "an", "the", "one", "thing", "kind", "of"), word
    return kept


def _one(scene: Scene, words: str) -> Thing:
    found = _things(scene, words)
    assert len(found) == 1, (words, found)
    return found[0]


def _found_again(scene: Scene, question_type: str, text: str) -> str:
    words = text.rstrip(" ?.")
    if question_type == "exist":
        return "yes" if _things(scene, words.removeprefix("is there ").removeprefix("do you see ")) else "no"
    if question_type == "count":
        return str(len(_things(scene, words.removeprefix("how many ").split(" are ")[0].split(" do ")[0])))
    if question_type == "color":
        return _one(scene, words.split(" is the ")[1].removeprefix("color of the ")).color
    if question_type == "shape":
        return _one(scene, f"{words.split()[-1]} shape").name
    if question_type == "where":
        x, y = _one(scene, words.split(" is ")[1]).center
        return f"{'top' if y < 48 else 'bottom'} {'left' if x < 48 else 'right'}"
    if question_type == "relation":
        axis = 0 if "left or right" in words else 1
        first, second = words.removeprefix("is ").split((" left or right of ", " above or below ")[axis])
        before = _one(scene, first).center[axis] < _one(scene, second).center[axis]
        return RELATIONS[2 * axis + (not before)]
    if question_type in ("read", "item"):
        word = "number" if question_type == "read" else "item"
        colors = [color for color in COLORS if f" {color}" in words]
        return _one(scene, f"{' '.join(colors)} {word}").name
    color = next(color for color in COLORS if f" {color}" in words)
    return _one(scene, color).kind


@pytest.mark.parametrize("question_type", TYPES)
def test_answers_follow_from_the_scene(question_type: str) -> None:
    asked = 0
    for scene in SCENES:
        question = ask(scene, Rng(scene.seed), question_type)
        if question is not None:
            asked += 1
            assert _found_again(scene, question_type, question.text) == question.answer, (scene, question)
    assert asked > len(SCENES) // 2


def test_questions_about_an_image_are_of_different_types() -> None:
    for scene in SCENES[:100]:
        types = [question.type for question in questions_of(scene)]
        assert len(set(types)) == len(types)
        assert len(ask_all(scene, Rng(1), 9)) >= len(types)


def test_no_to_exist_is_a_hard_no() -> None:
    """The color and the shape of an absent thing are nearly always both in the image."""
    hard = []
    for scene in SCENES:
        question = ask(scene, Rng(scene.seed), "exist")
        assert question is not None
        if question.answer == "no":
            color, name = question.text.rstrip(" ?").split()[-2:]
            hard.append(bool(_things(scene, color)) and bool(_things(scene, name)))
    assert sum(hard) / len(hard) > 0.9


IMAGES_DIGEST = "47633d4e8eb42a67c4828c051e6ef56399a7b98e6afbb4ff440465b5da1f5cce"
QUESTIONS_DIGEST = "503fa9ed55b46f9dde0a571460efb880d4218ff29511aca2f66983d4d32a2a65"
