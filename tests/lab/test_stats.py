"""Intervals have the right bounds, and the bootstrap draws images."""

import numpy as np
import pytest

from vlmzip.lab.stats import Bootstrap, estimate


def interval(scores, images, seed=0, draws=2000):
    found = Bootstrap(images, seed, draws).share(np.asarray(scores, float), np.ones(len(scores)))
    return estimate(found)


def test_an_interval_of_independent_questions_is_about_two_standard_errors_each_way():
    scores = [1] * 300 + [0] * 100
    found = interval(scores, [str(n) for n in range(400)])
    error = (0.75 * 0.25 / 400) ** 0.5
    assert found.value == 0.75
    assert found.low == pytest.approx(0.75 - 1.96 * error, abs=0.3 * error)
    assert found.high == pytest.approx(0.75 + 1.96 * error, abs=0.3 * error)


def test_questions_about_one_image_are_not_independent():
    """Each image has four questions, all right or all wrong: the interval is as wide as for a quarter of them."""
    scores = np.repeat(([1] * 75 + [0] * 25), 4)
    alone = interval(scores, [str(n) for n in range(400)])
    together = interval(scores, [str(n // 4) for n in range(400)])
    assert together.half == pytest.approx(2 * alone.half, rel=0.15)


def test_a_difference_is_paired():
    """Two methods fail on the same questions except for 1 %, so the interval of their difference is narrow."""
    rng = np.random.default_rng(1)
    one = rng.integers(0, 2, 400).astype(float)
    two = one.copy()
    two[:4] = 1 - two[:4]
    bootstrap, ones = Bootstrap([str(n) for n in range(400)], 0), np.ones(400)
    found = estimate(bootstrap.share(two, ones) - bootstrap.share(one, ones))
    assert found.value == pytest.approx(two.mean() - one.mean())
    assert found.half < 0.015 < interval(one, [str(n) for n in range(400)]).half


def test_the_same_seed_gives_the_same_interval_and_another_another():
    scores, images = [1, 0, 1, 1, 0, 0, 1], list("abcdefg")
    assert interval(scores, images) == interval(scores, images)
    assert interval(range(7), images) != interval(range(7), images, seed=1)


def test_a_share_of_sums_where_nothing_is_below():
    found = Bootstrap(["a", "b"], 0).share(np.zeros(2), np.zeros(2))
    assert estimate(found).value == 0


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_where_all_are_alike_there_is_nothing_between(score):
    found = interval([score] * 5, list("abcde"))
    assert (found.value, found.low, found.high) == (score, score, score)
