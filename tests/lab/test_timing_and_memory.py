"""Timing, memory and the description of the machine."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch

from tests.tiny import batch, prompt
from vlmzip import FastV, VisionZip, attach
from vlmzip.files import write_csv
from vlmzip.lab.bench.memory import FRUGAL, in_frugal_process
from vlmzip.lab.bench.timing import Spans, cpu_seconds, in_turns, interleaved, quartiles, ratios, time_answer
from vlmzip.lab.machine import about, commit, file_name, hardware
from vlmzip.models import family_of


def test_variants_take_turns_and_the_warm_up_does_not_count():
    order = []
    seconds = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, repeats=3, warmup=2)
    assert "".join(order) == "abccbaabccbaabc"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_seconds_are_seconds():
    seconds = interleaved({"short": lambda: None, "long": lambda: time.sleep(0.05)}, repeats=2)
    assert min(seconds["long"]) >= 0.05 > max(seconds["short"])


def test_variants_are_timed_by_any_clock():
    seconds = interleaved({"a": lambda: time.sleep(0.05)}, repeats=2, clock=cpu_seconds)
    assert max(seconds["a"]) < 0.05


def test_what_variants_return_is_kept_in_order():
    numbers = iter(range(100))
    kept = []
    keep = lambda found: kept.append({name: list(values) for name, values in found.items()})  # noqa: E731
    found = in_turns({name: lambda: next(numbers) for name in "ab"}, repeats=3, warmup=1, keeping=keep)
    assert kept == [{name: values[:count] for name, values in found.items()} for count in (1, 2, 3)]
    assert found == {"a": [3, 4, 7], "b": [2, 5, 6]}


class TestAnAnswer:
    def slow(self, monkeypatch, module, seconds, sleep=time.sleep):
        """Delay a module by `seconds`; modules of the LLM are delayed at every call."""
        run = module.forward

        def forward(*args, **kwargs):
            sleep(seconds)
            return run(*args, **kwargs)

        monkeypatch.setattr(module, "forward", forward)

    @pytest.mark.parametrize("method", [None, VisionZip(keep=9), FastV(layer=1, keep=9)])
    def test_the_spans_hold_what_they_say(self, llava, monkeypatch, method):
        inputs = batch(prompt(1, "image", 7, 8), prompt(1, "image", 9, 5), images=2)
        model, model_family = (attach(llava, method) if method else llava), family_of(llava)
        slept = []  # a fake clock that only advances here
        self.slow(monkeypatch, llava.model.vision_tower, 20, slept.append)
        self.slow(monkeypatch, llava.model.language_model.layers[2], 10, slept.append)
        self.slow(monkeypatch, llava.lm_head, 5, slept.append)
        spans = time_answer(model, model_family, inputs, 4, lambda _: float(sum(slept)))
        assert spans == Spans(prefill=15, ttft=35, token=15)

    def test_cpu_seconds_leave_waiting_out(self, llava, monkeypatch):
        inputs, model_family = batch(prompt(1, "image", 7), images=1), family_of(llava)
        self.slow(monkeypatch, llava.model.language_model.layers[2], 0.5)
        spans = time_answer(llava, model_family, inputs, 2, cpu_seconds)
        assert 0 < spans.prefill < spans.ttft < 0.4
        assert 0 < spans.token < 0.4

    def test_nothing_stays_on_the_model_even_after_an_error(self, llava, monkeypatch):
        def broken(*_, **__):
            raise RuntimeError("boom")

        modules = (llava.model.language_model, llava.lm_head)
        before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
        monkeypatch.setattr(llava.lm_head, "forward", broken)
        with pytest.raises(RuntimeError, match="boom"):
            time_answer(llava, family_of(llava), batch(prompt(1, "image", 7), images=1), 2)
        assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules] == before

    def test_an_end_of_sequence_ends_nothing(self, llava, monkeypatch):
        monkeypatch.setattr(llava.generation_config, "eos_token_id", list(range(50)))
        calls = []
        handle = llava.lm_head.register_forward_hook(lambda *_: calls.append(1))
        time_answer(llava, family_of(llava), batch(prompt(1, "image", 7), images=1), 5)
        handle.remove()
        assert len(calls) == 5

    def test_one_token_has_no_further_ones(self, llava):
        with pytest.raises(ValueError, match="at least 2"):
            time_answer(llava, family_of(llava), {}, 1)


def test_quartiles_and_ratios_round_by_round():
    assert quartiles([4.0]) == (4.0, 4.0, 4.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0)
    assert ratios([1.0, 2.0, 10.0], plain=[2.0, 4.0, 20.0]) == (2.0, 2.0, 2.0)


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="0 repeats"):
        interleaved({"a": lambda: None}, repeats=0)


def peaks(*lines):
    """Return the numbers that code prints in a fresh process."""
    code = "\n".join(["import torch; from vlmzip.lab.bench.memory import peak_bytes", *lines])
    out = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | FRUGAL, capture_output=True, text=True, check=True
    )
    return [int(number) for number in out.stdout.split()]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_is_what_a_run_takes():
    large, none = peaks(
        "kept = torch.ones(30_000_000)",
        "print(peak_bytes(lambda: torch.ones(10_000_000).sum()), peak_bytes(lambda: kept.sum()))",
    )
    assert 39e6 <= large < 48e6  # Linux counts pages in batches
    assert none < 4e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_in_a_process_that_has_used_much_before():
    (peak,) = peaks(
        # The tensors are small enough for the heap. The last one keeps it from shrinking when the others are freed.
        "freed = [torch.ones(10_000) for _ in range(1000)]; pin = torch.ones(10_000); del freed",
        "print(peak_bytes(lambda: [torch.ones(15_000) for _ in range(300)]))",
    )
    assert 17e6 <= peak < 24e6


def tell_of_the_process(name):
    yield os.getpid(), os.getenv(name)


@pytest.mark.slow
def test_a_frugal_process_is_another_one_and_this_one_stays_as_it_is():
    name = next(iter(FRUGAL))
    [(process, value)] = in_frugal_process(tell_of_the_process, name)
    assert process != os.getpid()
    assert value == FRUGAL[name]
    assert name not in os.environ


def test_the_name_of_a_results_file():
    name = file_name("bench mini", "cpu", "float32", "batch2")
    assert re.fullmatch(
        r"bench-mini-[A-Za-z0-9.+-]+-threads?-torch[0-9.+a-z]+-transformers[0-9.a-z]+-float32-batch2\.csv", name
    )


def test_what_a_number_was_measured_on():
    told = about("cpu")
    assert told["torch"] == torch.__version__
    assert re.search(r", \d+ threads?$", hardware("cpu"))
    assert told["commit"] == commit() != ""


def test_a_table_on_disk(tmp_path):
    write_csv(tmp_path / "deep" / "t.csv", [{"a": 1, "b": "x, y"}, {"a": 2, "b": None}])
    assert (tmp_path / "deep" / "t.csv").read_text() == 'a,b\n1,"x, y"\n2,\n'
