"""`vlmzip bench`: measure speed and memory at the dimensions of a large model, with random weights."""

from __future__ import annotations

import gc
import logging
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from vlmzip import spec
from vlmzip.children import ChildFailed
from vlmzip.cli._options.bench import ATTENTION, CLOCKS, SMALL, WHOLE
from vlmzip.cli._options.common import check_counts, check_folder
from vlmzip.cli._shared.bench_progress import DUE, MEMORY_ROUNDS, START, Progress
from vlmzip.cli._shared.budget import budget_of
from vlmzip.cli._shared.console import bar, log_on_stderr, spinner
from vlmzip.cli._shared.method import refuse_second_budgets
from vlmzip.compressor import BudgetError, Compressor, Profile
from vlmzip.errors import UserError, closest
from vlmzip.keep import AS_SET, parse_keep
from vlmzip.lab.bench.bench import PLAIN, Contender, bench, peaks, profile_of
from vlmzip.lab.bench.memory import available_bytes, in_frugal_process
from vlmzip.lab.bench.output import Measurement, as_json, doubts, gaps, print_tables, table
from vlmzip.lab.bench.presets import PRESETS, Model, Preset, make_model
from vlmzip.lab.bench.timing import cpu_seconds, now
from vlmzip.lab.budgets import counts_remaining, fit, keep_of
from vlmzip.lab.machine import about, file_name
from vlmzip.lab.table import Table, print_json, show_bytes
from vlmzip.models import family_of
from vlmzip.progress import Work
from vlmzip.runtime.loading import DTYPES, check_dtype, find_device

log = logging.getLogger(__name__)


def run(args: Namespace) -> None:
    _check(args)
    methods = spec.read_several(args.methods)
    if not methods:
        raise UserError("--methods names no method; separate them with commas: --methods visionzip,pool2d")
    if args.budget is not None:
        refuse_second_budgets(methods, args.budget)

    device = find_device(args.device)
    on_gpu = device.type == "cuda"
    if on_gpu and args.clock == "cpu":
        raise UserError("--clock cpu cannot time a GPU; leave it out, or give --device cpu")
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.scale = args.scale or ("1" if on_gpu else SMALL)
    preset = _preset(args)
    machine = about(device)  # read now, because the sources may change during the run
    path = None
    if args.out:
        scaled = f"scale{_number(args.scale):g}"
        settings = [scaled, args.dtype, args.attention, f"batch{args.batch}", _in_words(args.budget)]
        settings += ["cpu-seconds"] * (args.clock == "cpu")
        path = args.out / file_name(f"bench-{args.preset}", device, *settings)
    contenders: list[Contender] = []

    def keep(measured: list[Contender]) -> None:
        contenders[:] = measured
        if path is not None:
            with suppress(UserError):  # `_show` reports a disk error
                table(contenders, args, preset, machine).write_csv(_unfinished(path))

    try:
        _measure(args, preset, methods, device, DTYPES[args.dtype], keep)
    finally:  # show and write the measurements even if an error ends the run
        if contenders:
            _show(contenders, table(contenders, args, preset, machine), args, preset, device, path)


def _unfinished(path: Path) -> Path:
    """Return the file of results during a run. Earlier results stay in `path` until the new ones are complete."""
    return path.with_name(f"{path.stem}.unfinished.csv")


def _show(
    contenders: list[Contender],
    measurements: Table[Measurement],
    args: Namespace,
    preset: Preset,
    device: torch.device,
    path: Path | None,
) -> None:
    """Print the measurements and write them. Results of a run that was stopped stay in the unfinished file."""
    doubtful = doubts(contenders, args, device, narrow=_number(args.scale) < _number(SMALL)) + gaps(
        contenders, args.repeats
    )
    whole = len(contenders[0].spans) == args.repeats
    target = path if path is None or whole else _unfinished(path)
    try:
        if target is not None:
            measurements.write_csv(target)
        if path is not None and whole:
            _unfinished(path).unlink(missing_ok=True)
    finally:  # print the measurements even if the disk is full
        if args.json:
            print_json(as_json(contenders, measurements, doubtful, target))
        else:
            print_tables(contenders, args, preset, device, doubtful, target)


def _measure(
    args: Namespace,
    preset: Preset,
    methods: list[tuple[str, Compressor]],
    device: torch.device,
    dtype: torch.dtype,
    keep: Callable[[list[Contender]], None],
) -> None:
    """Time the methods, then measure their memory; call `keep` with each result."""
    methods = [(name, method) for name, method in methods if name != PLAIN]
    config = preset.config(args.text_tokens, args.new_tokens)
    _refuse_what_cannot_run(args, config, device, dtype)
    rounds = f"{args.repeats} rounds" if args.repeats > 1 else "one round"
    log.info(f"{len(methods) + 1} methods, {PLAIN} among them: {rounds} of each, after a warm-up round")
    with spinner("making the model"):
        model = _make_model(args, config, device, dtype)
        inputs = preset.inputs(args.batch, args.text_tokens, device, dtype)
        (family,) = family_of(model).present_in(inputs)
        profile = profile_of(family, inputs)
        contenders = [_set_up(name, method, args.budget, profile) for name, method in methods]
    runs = Work("warming up", (1 + len(contenders)) * (1 + args.repeats + MEMORY_ROUNDS))
    with bar(runs) as runs.changed:
        progress = Progress(runs, starting=START if device.type == "cpu" else 0)
        contenders = bench(
            model,
            family,
            inputs,
            contenders,
            repeats=args.repeats,
            new_tokens=args.new_tokens,
            clock=cpu_seconds if args.clock == "cpu" else now,
            telling=progress,
            keeping=keep,
        )
        progress.memory()
        recipe = (args, preset, device, dtype, [contender.compressor for contender in contenders])
        if device.type == "cpu":
            del model, family, inputs  # the other process makes its own model, and both may not fit
            _measure_memory(contenders, recipe, keep)
        else:
            for contender, peak in zip(contenders, _peaks(*recipe, model=model), strict=True):
                contender.peak_bytes = peak


def _measure_memory(
    contenders: list[Contender], recipe: tuple[Any, ...], keep: Callable[[list[Contender]], None]
) -> None:
    """Measure the memory in another process.

    The system may kill that process if the memory is full; the timings survive.
    """
    gc.collect()  # a model and its hooks refer to each other
    measured = 0
    try:
        for contender, peak in zip(contenders, in_frugal_process(_peaks_in_child, *recipe), strict=True):
            contender.peak_bytes, measured = peak, measured + 1
            keep(contenders)
    except ChildFailed as error:
        for contender in contenders[measured:]:
            contender.without_peak = f"the memory was not measured: {error}"


def _make_model(args: Namespace, config: PreTrainedConfig, device: str | torch.device, dtype: torch.dtype) -> Model:
    try:
        return make_model(config, device, dtype, args.attention)
    except (ImportError, ValueError) as error:  # FlashAttention is not installed or does not support this dtype
        raise UserError(f"--attention {args.attention} cannot be used: {error}") from None


def _peaks(
    args: Namespace,
    preset: Preset,
    device: torch.device,
    dtype: torch.dtype,
    compressors: list[Compressor | None],
    model: Model | None = None,
) -> Iterator[int | None]:
    progress = Progress()  # without a bar: on a CPU, the bar belongs to the parent process

    def telling(done: int) -> None:
        progress.say(f"measuring the memory: {done} of {len(compressors)} methods done", DUE)

    if model is None:
        config = preset.config(args.text_tokens, args.new_tokens)
        _refuse_what_cannot_run(args, config, device, dtype)
        model = _make_model(args, config, device, dtype)
    inputs = preset.inputs(args.batch, args.text_tokens, device, dtype)
    return peaks(model, inputs, compressors, args.new_tokens, telling)


def _peaks_in_child(*recipe: Any) -> Iterator[int | None]:
    """Yield the values of `_peaks` in another process, and set up logging there."""
    with log_on_stderr():
        yield from _peaks(*recipe)


def _set_up(name: str, method: Compressor, budget: str | None, profile: Profile) -> Contender:
    """Return the method at the budget.

    If the method cannot reach the budget, it keeps its own settings and the row has a note: the row still shows its
    cost and limit.
    """
    if budget is None:
        return Contender(name, method.placed(profile))
    try:
        chosen, _, note = fit(method, budget, profile)
        return Contender(name, chosen, note)
    except BudgetError as error:
        return Contender(name, method.placed(profile), f"runs with its own settings, not at this budget: {error}")


def _refuse_what_cannot_run(
    args: Namespace, config: PreTrainedConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise `UserError` if the attention implementation is unavailable or the weights exceed the free memory.

    Without this check, the system would kill the process.
    """
    weights = sum(p.numel() for p in _make_model(args, config, "meta", dtype).parameters()) * dtype.itemsize
    room = available_bytes(device)
    if room is not None and weights > room:
        raise UserError(
            f"the weights take {show_bytes(weights)}, but {show_bytes(room)} of memory are free; give a smaller --scale"
        )


def _check(args: Namespace) -> None:
    """Raise `UserError` for invalid options before the model is made, and set `args.budget`."""
    if args.preset not in PRESETS:
        raise UserError(f"unknown preset {args.preset!r}{closest(args.preset, PRESETS)}")
    for name, choices in (("attention", ATTENTION), ("clock", CLOCKS)):
        if (value := getattr(args, name)) not in choices:
            raise UserError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
    for name, _, least, _ in WHOLE:
        check_counts(args, name.replace("-", "_"), least=least)
    check_dtype(args.dtype)
    args.budget = budget_of(args)
    if args.scale is not None:
        _preset(args)
    check_folder(args)


def _preset(args: Namespace) -> Preset:
    return PRESETS[args.preset].scaled(_number(args.scale))


def _number(text: str) -> float:
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--scale {text!r} is not a number; write 0.125 or 1/8") from None


def _in_words(budget: str | None) -> str:
    """Return the budget for a file name."""
    if budget is None:
        return f"keep-{AS_SET}"
    return f"{'left' if counts_remaining(budget) else 'keep'}{parse_keep(keep_of(budget)):.3g}"
