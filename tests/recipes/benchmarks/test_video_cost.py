"""The cost of selections on videos: every variant runs on the same video, and ratios are taken within rounds."""

from argparse import Namespace

import pytest

from recipes.benchmarks.video_cost import METHODS, MODELS, PLAIN, build, row, variant

ARGS = Namespace(device="cpu", dtype="float32")


@pytest.mark.parametrize("name", MODELS)
def test_every_variant_runs_on_the_same_video(name):
    model = build(name, ARGS)
    tokens = {method: variant(model, 8, method, ARGS)()["tokens"] for method in (PLAIN, *METHODS)}
    assert tokens.pop(PLAIN) == 4 * 64
    assert tokens.pop("dfmr") in {4 * 64, 4 * 16}
    assert set(tokens.values()) == {64}


def test_ratios_are_medians_within_rounds():
    plain = [{"seconds": second, "selection": 0.0, "tokens": 64} for second in (1.0, 2.0, 4.0)]
    runs = [{"seconds": 1.5 * second, "selection": second / 10, "tokens": 16} for second in (1.0, 2.0, 4.0)]
    measured = row(runs, plain, 3 * 2**20, 2**20)
    assert (measured["time_ratio"], measured["selection_over_encoder"]) == ("1.5000", "0.10000")
    assert (measured["memory_ratio"], measured["median_ms"], measured["peak_mib"]) == ("3.000", "3000.0", "3.0")
    assert (measured["tokens_before"], measured["tokens_after"]) == (64, 16)
