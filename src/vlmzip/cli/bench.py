"""`vlmzip bench`: speed and memory at chosen dimensions, with random weights."""

from __future__ import annotations

import gc
import json
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmzip.cli.options import check_folder, refuse_second_budgets
from vlmzip.errors import UserError, closest
from vlmzip.keep import A_NINTH, parse_keep
from vlmzip.outline import METHOD_FORMS

if TYPE_CHECKING:
    import torch

    from vlmzip.compressor import Compressor, Profile
    from vlmzip.lab.bench.bench import Contender
    from vlmzip.lab.bench.presets import Preset

EXAMPLES = """  vlmzip bench
  vlmzip bench --preset llava-next-7b --methods visionzip,pool2d --keep 11% --scale 1/16
  vlmzip bench --preset llava-1.5-13b --device cuda --dtype bfloat16 --batch 8 --out benchmarks/results
  vlmzip bench --methods "llavolta(layer=2,stride=8),fastv(layer=3,keep=50%)" --keep none --json"""

METHODS = "visionzip,pool2d,kmeans,downsample,random_tokens,llavolta,fastv,sparsevlm"
ATTENTION = ("sdpa", "eager", "flash_attention_2")
CLOCKS = ("wall", "cpu")
#: What a small CPU does in a few minutes.
SMALL = "1/8"
#: Options that are whole numbers: name, default, least, what it is.
WHOLE = (
    ("text-tokens", 64, 1, "tokens of text in a prompt"),
    ("new-tokens", 8, 2, "tokens of an answer"),
    ("batch", 1, 1, "prompts at once"),
    ("repeats", 11, 1, "timed rounds"),
)


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("--preset", default="llava-1.5-7b", help=_presets_help())
    parser.add_argument(
        "--scale",
        metavar="S",
        help="make LLM and vision encoder narrower: attention heads and MLP widths times S (0.125 or 1/8; at least one"
        f" head); layers, tokens and vocabulary stay; default: 1 on a GPU, {SMALL} on a CPU",
    )
    parser.add_argument("--methods", default=METHODS, metavar="A,B,…", help=f"each {METHOD_FORMS}; default: {METHODS}")
    parser.add_argument(
        "--keep",
        default=A_NINTH,
        help="visual tokens kept per image: 64, 0.25 or 25%%; none: methods as they are written; default: a ninth",
    )
    for name, usual, least, what in WHOLE:
        parser.add_argument(
            f"--{name}", type=int, metavar="N", default=usual, help=f"{what}, at least {least}; default: {usual}"
        )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, …; default: a GPU if there is one")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16 or float16; default: bfloat16 on a GPU")
    parser.add_argument("--attention", default=ATTENTION[0], help=f"{', '.join(ATTENTION)}; default: %(default)s")
    parser.add_argument(
        "--clock",
        default=CLOCKS[0],
        help="wall, or cpu: seconds that this process computed, for a CPU that others use too (with one thread);"
        " default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write a CSV there, named by hardware and versions")


def run(args: Namespace) -> None:
    from vlmzip import spec

    _check(args)
    methods = spec.read_several(args.methods)
    if not methods:
        raise UserError("--methods names no method; separate them with commas: --methods visionzip,pool2d")
    if args.keep is not None:
        refuse_second_budgets(methods, args.keep, "take the budget out of the method, or give --keep none")
    from vlmzip.cli.bench_output import rows
    from vlmzip.files import write_csv
    from vlmzip.lab.machine import about, file_name
    from vlmzip.runtime.loading import DTYPES, find_device

    device = find_device(args.device)
    on_gpu = device.type == "cuda"
    if on_gpu and args.clock == "cpu":
        raise UserError("--clock cpu does not see what a GPU does; leave it out, or give --device cpu")
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.scale = args.scale or ("1" if on_gpu else SMALL)
    preset = _preset(args)
    machine = about(device)  # of the sources that run now, whatever is changed meanwhile
    path = None
    if args.out:
        scaled = f"scale{_number(args.scale):g}"
        settings = [scaled, args.dtype, args.attention, f"batch{args.batch}", f"keep{_keep_in_words(args.keep)}"]
        settings += ["cpu-seconds"] * (args.clock == "cpu")
        path = args.out / file_name(f"bench-{args.preset}", device, *settings)
    found: list[Contender] = []

    def keep(measured: list[Contender]) -> None:
        found[:] = measured
        if path is not None:
            with suppress(UserError):  # the last time says that the disk refuses
                write_csv(_unfinished(path), rows(found, args, preset, machine))

    try:
        _measure(args, preset, methods, device, DTYPES[args.dtype], keep)
    finally:  # whatever ends it, what was measured is shown and written
        if found:
            _show(found, rows(found, args, preset, machine), args, preset, device, path)


def _unfinished(path: Path) -> Path:
    """Where results stand while they are measured: those of an earlier run stay until these are whole."""
    return path.with_name(f"{path.stem}.unfinished.csv")


def _show(
    found: list[Contender],
    table: list[dict[str, Any]],
    args: Namespace,
    preset: Preset,
    device: torch.device,
    path: Path | None,
) -> None:
    """Prints what was measured, and writes it; the file of a run that was stopped stays an unfinished one."""
    from vlmzip.cli.bench_output import as_json, doubts, gaps, print_tables
    from vlmzip.files import write_csv

    doubtful = doubts(found, args, device, narrow=_number(args.scale) < _number(SMALL)) + gaps(found, args.repeats)
    whole = len(found[0].spans) == args.repeats
    target = path if path is None or whole else _unfinished(path)
    try:
        if target is not None:
            write_csv(target, table)
        if path is not None and whole:
            _unfinished(path).unlink(missing_ok=True)
    finally:  # a full disk must not cost what was measured
        if args.json:
            print(json.dumps(as_json(found, table, doubtful, target), indent=2))
        else:
            print_tables(found, args, preset, device, doubtful, target)


def _measure(
    args: Namespace,
    preset: Preset,
    methods: list[tuple[str, Compressor]],
    device: torch.device,
    dtype: torch.dtype,
    keep: Callable[[list[Contender]], None],
) -> None:
    """Time the methods, then measure their memory; call `keep` with each result."""
    from vlmzip.cli.bench_progress import START, Progress
    from vlmzip.cli.loading import console, tell
    from vlmzip.lab.bench.bench import PLAIN, bench
    from vlmzip.lab.bench.presets import make_config
    from vlmzip.lab.bench.timing import cpu_seconds, now
    from vlmzip.models import adapter_for

    methods = [(name, method) for name, method in methods if name != PLAIN]
    _refuse_what_cannot_run(args, make_config(preset, args.text_tokens, args.new_tokens), device, dtype)
    rounds = f"{args.repeats} rounds" if args.repeats > 1 else "one round"
    tell(f"{len(methods) + 1} methods, {PLAIN} among them: {rounds} of each, after one to warm up")
    with console.status("making the model …") as status:
        progress = Progress(status, starting=START if device.type == "cpu" else 0)
        model, inputs = _make(args, preset, device, dtype)
        adapter = adapter_for(model)
        contenders = [_set_up(name, method, args.keep, adapter.profile()) for name, method in methods]
        found = bench(
            model,
            adapter,
            inputs,
            contenders,
            repeats=args.repeats,
            new_tokens=args.new_tokens,
            clock=cpu_seconds if args.clock == "cpu" else now,
            telling=progress,
            keeping=keep,
        )
        progress.memory()
        recipe = (args, preset, device, dtype, [one.compressor for one in found])
        if device.type == "cpu":
            del model, adapter, inputs  # the other process makes its own, and there may be no room for both
            _measure_memory(found, recipe, keep)
        else:
            for one, peak in zip(found, _peaks(*recipe, model=model), strict=True):
                one.peak_bytes = peak


def _measure_memory(found: list[Contender], recipe: tuple[Any, ...], keep: Callable[[list[Contender]], None]) -> None:
    """Measures in a process of its own, which may be killed for want of memory: all else is kept."""
    from vlmzip.children import ChildFailed
    from vlmzip.lab.bench.memory import in_frugal_process

    gc.collect()  # a model and its hooks refer to each other
    measured = 0
    try:
        for one, peak in zip(found, in_frugal_process(_peaks, *recipe), strict=True):
            one.peak_bytes, measured = peak, measured + 1
            keep(found)
    except ChildFailed as error:
        for one in found[measured:]:
            one.without_peak = f"the memory was not measured: {error}"


def _make(args: Namespace, preset: Preset, device: torch.device, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """The model and what it is asked."""
    from vlmzip.lab.bench.presets import make_config, make_inputs

    model = _make_model(args, make_config(preset, args.text_tokens, args.new_tokens), device, dtype)
    return model, make_inputs(preset, args.batch, args.text_tokens, device, dtype)


def _make_model(args: Namespace, config: Any, device: str | torch.device, dtype: torch.dtype) -> Any:
    from vlmzip.lab.bench.presets import make_model

    try:
        return make_model(config, device, dtype, args.attention)
    except (ImportError, ValueError) as error:  # no FlashAttention here, or none for this precision
        raise UserError(f"--attention {args.attention} cannot be used: {error}") from None


def _peaks(
    args: Namespace,
    preset: Preset,
    device: torch.device,
    dtype: torch.dtype,
    compressors: list[Compressor | None],
    model: Any = None,
) -> Iterator[int | None]:
    from vlmzip.cli.bench_progress import DUE, Progress
    from vlmzip.lab.bench.bench import peaks
    from vlmzip.lab.bench.presets import make_config, make_inputs

    progress = Progress()  # without a spinner: on a CPU that is another process's

    def telling(done: int) -> None:
        progress.tell(f"measuring the memory: {done} of {len(compressors)} methods done", DUE)

    if model is None:
        _refuse_what_cannot_run(args, make_config(preset, args.text_tokens, args.new_tokens), device, dtype)
        model = _make(args, preset, device, dtype)[0]
    inputs = make_inputs(preset, args.batch, args.text_tokens, device, dtype)
    return peaks(model, inputs, compressors, args.new_tokens, telling)


def _set_up(name: str, method: Compressor, keep: Any, profile: Profile) -> Contender:
    """The method at the budget; where it cannot reach it, as it is written: cost and limit stand beside it anyway."""
    from vlmzip.compressor import BudgetError, missed
    from vlmzip.lab.bench.bench import Contender

    if keep is None:
        return Contender(name, method.placed(profile))
    try:
        chosen, reached = method.at_budget(keep, profile)
        return Contender(name, chosen, missed(keep, reached, profile))
    except BudgetError as error:
        return Contender(name, method.placed(profile), f"not at this budget, but as it is set: {error}")


def _refuse_what_cannot_run(args: Namespace, config: object, device: torch.device, dtype: torch.dtype) -> None:
    """Raises `UserError` for an attention that is not there, and for weights that the memory has no room for: the
    system would end the process instead."""
    from vlmzip.cli.tables import show_bytes
    from vlmzip.lab.bench.memory import available_bytes

    weights = sum(p.numel() for p in _make_model(args, config, "meta", dtype).parameters()) * dtype.itemsize
    room = available_bytes(device)
    if room is not None and weights > room:
        raise UserError(
            f"the weights take {show_bytes(weights)}, and there are {show_bytes(room)} of memory: give --scale"
        )


def _check(args: Namespace) -> None:
    """Raises `UserError` for what can be refused before anything slow happens, and reads `keep`."""
    from vlmzip.lab.bench.presets import PRESETS
    from vlmzip.runtime.loading import check_dtype

    if args.preset not in PRESETS:
        raise UserError(f"there is no preset {args.preset!r}{closest(args.preset, PRESETS)}")
    for name, choices in (("attention", ATTENTION), ("clock", CLOCKS)):
        if (value := getattr(args, name)) not in choices:
            raise UserError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
    for name, _, least, _ in WHOLE:
        if (value := getattr(args, name.replace("-", "_"))) < least:
            raise UserError(f"--{name} {value}: give at least {least}")
    check_dtype(args.dtype)
    if args.keep == "none":
        args.keep = None
    else:
        parse_keep(args.keep)
    if args.scale is not None:
        _preset(args)
    check_folder(args)


def _preset(args: Namespace) -> Preset:
    from vlmzip.lab.bench.presets import PRESETS

    return PRESETS[args.preset].scaled(_number(args.scale))


def _number(text: str) -> float:
    from fractions import Fraction

    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--scale {text!r} is no number; write 0.125 or 1/8") from None


def _keep_in_words(keep: object) -> str:
    return "none" if keep is None else f"{keep:.3g}" if isinstance(keep, float) else str(keep).replace("%", "pc")


def _presets_help() -> str:
    return (
        "llava-1.5-7b, llava-1.5-13b: 576 visual tokens; llava-next-7b, llava-next-13b: the same models at LLaVA-NeXT's"
        " 2,880, as five images; video-llava-7b: at Video-LLaVA's 2,048, as eight; default: %(default)s"
    )
