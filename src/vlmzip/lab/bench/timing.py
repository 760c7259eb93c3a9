"""Time variants interleaved in one run, so that other work on the machine affects all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationMixin

from vlmzip.models.family import Family
from vlmzip.runtime.facade import CompressedModel

T = TypeVar("T")


class Quartiles(NamedTuple):
    """Median and quartiles of repeated measurements."""

    median: float
    first: float
    third: float


def now(device: str | torch.device = "cpu") -> float:
    """Return the time in seconds, after all work that was sent to the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def cpu_seconds(device: str | torch.device = "cpu") -> float:
    """Return the CPU time of this process in seconds, all threads together.

    With one thread, on a CPU that other processes use too, this is what `now` would measure on an idle CPU. Waiting
    does not count, so it cannot time a GPU.
    """
    return time.process_time()


def in_turns(
    runs: Mapping[str, Callable[[], T]],
    repeats: int,
    *,
    warmup: int = 1,
    keeping: Callable[[dict[str, list[T]]], object] = lambda _: None,
) -> dict[str, list[T]]:
    """Return what each run of each variant returned.

    One round runs every variant once. Rounds alternate between forward and backward order, so that no variant always
    follows the same other one. The first `warmup` rounds are discarded. `keeping` is called with the results after each
    further round.
    """
    if repeats < 1:
        raise ValueError(f"{repeats} repeats measure nothing")
    by_name: dict[str, list[T]] = {name: [] for name in runs}
    for turn in range(-warmup, repeats):
        names = list(runs) if (turn + warmup) % 2 == 0 else list(runs)[::-1]
        results = {name: runs[name]() for name in names}
        if turn >= 0:
            for name, result in results.items():
                by_name[name].append(result)
            keeping(by_name)
    return by_name


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    warmup: int = 1,
    device: str | torch.device = "cpu",
    clock: Callable[[str | torch.device], float] = now,
) -> dict[str, list[float]]:
    """Return the seconds of each run of each variant, run as in `in_turns`."""

    def timed(run: Callable[[], object]) -> float:
        start = clock(device)
        run()
        return clock(device) - start

    return in_turns({name: partial(timed, run) for name, run in runs.items()}, repeats, warmup=warmup)


class Spans(NamedTuple):
    """The times of one answer, in seconds."""

    prefill: float
    """The LLM's prefill: its layers, compression inside them, and the output head."""
    ttft: float
    """From the call of `generate` to the first token: vision encoder, selection, projector, prefill."""
    token: float
    """The mean time of each further token."""


def time_answer(
    model: GenerationMixin | CompressedModel,
    family: Family,
    inputs: Mapping[str, Tensor],
    new_tokens: int,
    clock: Callable[[torch.device], float] = now,
) -> Spans:
    """Time one call of `generate`: greedy, and without an end before `new_tokens` (at least 2).

    `model` is a plain model or the result of `vlmzip.attach`; `family` is the plain model's. On a GPU every time mark
    waits for earlier work. The mark at the start of the LLM is one wait more than without timing.
    """
    if new_tokens < 2:
        raise ValueError("the time of further tokens needs at least 2")
    device = inputs["input_ids"].device
    begun: list[float] = []
    done: list[float] = []
    tokens: list[float] = []

    def mark(times: list[float], *_: object) -> None:
        if not times:  # only the first call has the prompt; later calls have single tokens
            times.append(clock(device))

    def each_token(ids: Tensor, *_: object, **__: object) -> Tensor:
        tokens.append(clock(device))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    head: nn.Module = family.model.get_output_embeddings()
    handles = [
        family.llm.register_forward_pre_hook(partial(mark, begun), prepend=True),
        head.register_forward_hook(partial(mark, done)),
    ]
    try:
        start = clock(device)
        model.generate(
            **inputs,
            do_sample=False,
            stopping_criteria=[each_token],
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
        )
    finally:
        for handle in handles:
            handle.remove()
    return Spans(done[0] - begun[0], tokens[0] - start, (tokens[-1] - tokens[0]) / (new_tokens - 1))


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return the quartiles of at least one value. A single value is all three."""
    if len(values) == 1:
        return Quartiles(values[0], values[0], values[0])
    first, middle, third = statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(middle, first, third)


def ratios(seconds: Sequence[float], plain: Sequence[float]) -> Quartiles:
    """Return how many times faster than `plain`: the quartiles of the ratios within each round."""
    return quartiles([slow / fast for slow, fast in zip(plain, seconds, strict=True)])
