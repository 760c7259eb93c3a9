"""The benchmark of selections covers every method, and ends runs that take too long."""

import subprocess
import sys

import pytest
import torch

from recipes.benchmarks import selection_by_method as recipe
from vlmzip import Grid, catalogue

TINY = {36: Grid(1, 6, 6), 180: Grid(5, 6, 6)}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(recipe, "SIZES", TINY)
    monkeypatch.setattr(recipe, "KEEPS", {"64 tokens": 4, "a ninth": 1 / 9})


def test_every_method_runs(tiny):
    available = catalogue.available()
    wanted = {name for name, cls in available.items() if name not in recipe.LEFT_OUT and not cls.trained_weights}
    for size in TINY:
        runs = recipe.runs_at(size)
        assert {name for name, *_ in runs} - {"signal: " + name for name in SIGNALS} == wanted
        with torch.inference_mode():
            for (name, setting, _), run in runs.items():
                if name != "zoo_prune" or setting:
                    run()


SIGNALS = ("attention of CLS", "keys", "attention of the question", "attention received")


STOPPED = """
import signal
from recipes.benchmarks import selection_by_method as recipe
recipe.LIMIT = 2.0
signal.signal(signal.SIGPROF, recipe.stop)
assert recipe.first_run(lambda: [n for n in range(10**10) if n < 0]) is None
assert recipe.first_run(lambda: None).seconds < 2.0
"""


def test_a_run_is_stopped_at_the_limit():
    """In another process, as the recipe is: in a test's process other tests may have changed signals."""
    subprocess.run([sys.executable, "-c", STOPPED], check=True, timeout=100)


def test_a_variant_that_would_exceed_the_limit_is_not_begun(tiny, monkeypatch):
    begun = []
    runs = {("a", "", ""): lambda: begun.append("a"), ("b", "", ""): lambda: begun.append("b")}
    smaller = {("a", "", ""): recipe.First(recipe.LIMIT / 4, 0)}  # five times as many tokens
    first = recipe.first_runs(runs, 180, smaller)
    assert begun == ["b"]
    assert first["a", "", ""] is None
    monkeypatch.setattr(recipe, "REPEATS", {180: 2})
    plain, seconds = recipe.times_at(runs, 180, first, lambda: None)
    assert len(plain) == len(seconds["b", "", ""]) == 2
    assert ("a", "", "") not in seconds


def test_growth_is_a_power_of_the_tokens():
    row = {"method": "kmeans", "setting": "", "keep": "a ninth"}
    rows = [row | {"tokens": "2880", "milliseconds": "1"}, row | {"tokens": "18432", "milliseconds": str(6.4**2)}]
    assert recipe.growth(rows, "milliseconds") == {("kmeans", "", "a ninth"): pytest.approx(2)}
    assert recipe.order(("kmeans", "", "a ninth")) == 2
    assert recipe.order(("kmeans", "", "64 tokens")) == 1
