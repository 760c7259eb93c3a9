"""The simulated losses have the mean and the dependence that the script states, and low losses are certified."""

import numpy as np
import pytest

from recipes.benchmarks.certified_by_chance import QUESTIONS, TOGETHER, draw_losses, is_certified, wrongly_certified


@pytest.mark.parametrize("together", TOGETHER)
def test_questions_about_an_image_are_lost_together(together):
    losses = draw_losses(np.random.default_rng(0), 20_000, 0.1, together).reshape(-1, QUESTIONS)
    assert losses.mean() == pytest.approx(0.1, abs=0.01)
    # With parameters that add up to 1, two questions about an image correlate with 1/2.
    expected = 1.0 if together == "all at once" else 0.5
    assert np.corrcoef(losses[:, 0], losses[:, 1])[0, 1] == pytest.approx(expected, abs=0.03)


def test_a_loss_is_certified_far_below_the_limit_only():
    assert is_certified(np.zeros(40 * QUESTIONS), 0.1)
    assert not is_certified(np.zeros(40 * QUESTIONS), 0.09)
    assert wrongly_certified(40, 0.1, "Beta", 10) <= 1
