"""What the encoder is taught follows from what is drawn."""

import pytest

from recipes.mini.targets import IGNORE, NAMES, targets
from vlmzip.mini.scene import make_dense_scene, make_scene

PATCH = 8


@pytest.mark.parametrize("make", [make_scene, make_dense_scene])
def test_targets_name_what_lies_on_a_patch(make) -> None:
    for seed in range(50):
        scene = make(seed)
        wanted = targets(scene, 12)
        assert wanted.middle.sum() <= len(scene.things)
        assert ((wanted.name == 0) == (wanted.color == IGNORE)).all()
        for thing in scene.things:
            x, y = thing.center
            patch = int(y) // PATCH * 12 + int(x) // PATCH
            names = {NAMES[wanted.name[patch]]}
            # A neighbor may cover more of the patch of a small thing's middle, but the thing is taught somewhere.
            name = "number" if thing.kind == "number" else thing.name
            assert name in names or name in {NAMES[number] for number in wanted.name}


def test_targets_spell_the_number() -> None:
    scene = next(
        scene for scene in map(make_scene, range(600)) if sum(thing.kind == "number" for thing in scene.things) == 1
    )
    name = next(thing.name for thing in scene.things if thing.kind == "number")
    taught = targets(scene, 12).digits
    rows = {tuple(row) for row in taught if row[0] != IGNORE}
    assert rows == {tuple([int(digit) for digit in name] + [10] * (3 - len(name)))}
