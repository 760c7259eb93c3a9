"""Random factors: equally frequent, the same after a resume, and different in other steps and processes."""

from collections import Counter

import pytest
import torch

from vlmzip import Grid, Pool2d, Profile, VisualTokens
from vlmzip.errors import UserError
from vlmzip.training.random_factor import RandomFactor
from vlmzip.training.schedule import read_compressor

GRID = Grid(1, 12, 12)


def images(count):
    return VisualTokens(torch.randn(count, 145, 4), GRID, prefix=1)


def lengths(compressor, count=600):
    return compressor(images(count)).length.tolist()


def test_each_image_draws_a_factor_and_factors_are_equally_frequent():
    counts = Counter(lengths(RandomFactor().at_step(step=3)))
    assert set(counts) == {144, 36, 16}
    assert all(160 < count < 240 for count in counts.values())  # 200 expected, standard deviation 12


def test_each_image_is_pooled_like_pool2d_with_its_factor():
    random, tokens = RandomFactor().at_step(7), images(9)
    token_map = random(tokens)
    pooled = token_map.apply(tokens.features)
    for row, length in enumerate(token_map.length.tolist()):
        alone = Pool2d(factor={144: 1, 36: 2, 16: 3}[length]).assign(tokens).apply(tokens.features)
        torch.testing.assert_close(pooled[row, :length], alone[row])


def test_the_same_step_draws_the_same_and_other_steps_and_processes_do_not():
    random = RandomFactor(seed=5)
    assert lengths(random.at_step(3, 1)) == lengths(random.at_step(3, 1))
    drawn = [lengths(one) for one in (random.at_step(3, 1), random.at_step(3, 2), random.at_step(4, 1))]
    drawn.append(lengths(RandomFactor(seed=6).at_step(3, 1)))
    assert len({tuple(one) for one in drawn}) == 4


def test_per_step_all_processes_share_one_factor():
    random = RandomFactor(per="step")
    steps = [random.at_step(step, salt=0) for step in range(300)]
    assert steps == [random.at_step(step, salt=1) for step in range(300)]
    assert {type(one) for one in steps} == {Pool2d}
    counts = Counter(one.factor for one in steps)
    assert set(counts) == {1, 2, 3}
    assert all(70 < count < 130 for count in counts.values())


def test_counts_before_anything_runs():
    assert RandomFactor().counts(GRID) == [144, 36, 16]
    assert RandomFactor().token_count(GRID) is None
    assert RandomFactor(factors=(2,)).token_count(GRID) == 36


def test_an_image_of_several_views_counts_all_of_them():
    profile = Profile(Grid(1, 6, 6), 2, tiles=(Grid(1, 6, 6),))
    assert RandomFactor(factors=(1, 3), per="step").cases_by_layer(profile) == [[72, 72], [8, 8]]
    assert RandomFactor(factors=(1, 3)).cases_by_layer(profile) == [[72, 72], [40, 40], [40, 40], [8, 8]]


def test_it_can_be_written_in_one_line():
    assert read_compressor("random_factor") == RandomFactor()
    asked = read_compressor("random_factor(factors=1,3,per=step,seed=4)")
    assert asked == RandomFactor(factors=(1, 3), per="step", seed=4)


def test_a_list_without_factors_is_refused_with_the_remedy():
    with pytest.raises(UserError, match=r"factors is empty; give window sizes, such as 1,2,3"):
        RandomFactor(factors=())


@pytest.mark.parametrize("settings", [{"factors": ()}, {"factors": (0, 1)}, {"factors": 3}, {"per": "epoch"}])
def test_nonsense_is_refused(settings):
    with pytest.raises(UserError):
        RandomFactor(**settings)
