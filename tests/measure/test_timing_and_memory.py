"""Timing, memory and where they were measured."""

import re
import subprocess
import sys
import time

import pytest
import torch

from vlmzip.files import write_csv
from vlmzip.measure.machine import about, commit, hardware
from vlmzip.measure.memory import FRUGAL
from vlmzip.measure.timing import interleaved, quartiles, ratios


def test_variants_take_turns_and_the_warm_up_does_not_count():
    order = []
    seconds = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, repeats=3, warmup=2)
    assert "".join(order) == "abccbaabccbaabc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_seconds_are_seconds():
    seconds = interleaved({"short": lambda: None, "long": lambda: time.sleep(0.05)}, repeats=2)
    assert min(seconds["long"]) >= 0.05 > max(seconds["short"])


def test_quartiles_and_ratios_round_by_round():
    assert quartiles([4.0]) == (4.0, 4.0, 4.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)
    assert ratios([1.0, 2.0, 10.0], plain=[2.0, 4.0, 20.0]) == (2.0, 2.0, 2.0)


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="0 repeats"):
        interleaved({"a": lambda: None}, repeats=0)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_is_what_a_run_takes():
    code = (
        "import torch; from vlmzip.measure.memory import peak_bytes\n"
        "kept = torch.ones(30_000_000)\n"
        "print(peak_bytes(lambda: torch.ones(10_000_000).sum()), peak_bytes(lambda: kept.sum()))"
    )
    out = subprocess.run([sys.executable, "-c", code], env=FRUGAL, capture_output=True, text=True, check=True)
    large, none = map(int, out.stdout.split())
    assert 39e6 <= large < 48e6  # Linux counts pages in batches
    assert none < 4e6


def test_what_a_number_was_measured_on():
    told = about("cpu")
    assert told["torch"] == torch.__version__
    assert re.search(r", \d+ threads?$", hardware("cpu"))
    assert told["commit"] == commit() != ""


def test_a_table_on_disk(tmp_path):
    write_csv(tmp_path / "deep" / "t.csv", [{"a": 1, "b": "x, y"}, {"a": 2, "b": None}])
    assert (tmp_path / "deep" / "t.csv").read_text() == 'a,b\n1,"x, y"\n2,\n'
