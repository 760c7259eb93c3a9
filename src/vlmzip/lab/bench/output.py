"""The measurements of `bench`: rows of a CSV, JSON, and tables."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from vlmzip import spec
from vlmzip.lab.bench.bench import SCOPES, Compared, Contender, Scope, compare
from vlmzip.lab.bench.presets import Preset
from vlmzip.lab.bench.timing import Quartiles
from vlmzip.lab.table import NOTHING, Console, show_bytes
from vlmzip.runtime.report import compact

WORDS: dict[Scope, str] = {"prefill": "LLM prefill", "ttft": "TTFT"}
#: Blocks of the table: a heading, and the columns after the method's name.
BLOCKS: tuple[tuple[Scope | None, str, tuple[str, ...]], ...] = (
    ("prefill", "LLM prefill, with output head", ("ms", "speed-up", "limit", "share of limit")),
    ("ttft", "TTFT: from the call to the first token", ("ms", "speed-up", "limit", "share of limit")),
    (None, "Memory and decoding", ("visual tokens", "KV cache", "peak memory", "tokens/s")),
)
#: The width of a block, and of a method's name in it, in characters per line.
WIDTH, NAME = 80, 30
#: Third over first quartile of the plain model's times. Above this, other work probably shares the processor.
BUSY = 1.25


def rows(found: list[Contender], args: Namespace, preset: Preset, machine: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return two rows for each method that ran, one per scope."""
    plain = found[0]
    table = []
    for one in found:
        for scope in SCOPES if one.spans else ():
            table.append(_row(one, scope, compare(one, plain, scope), args, preset) | {**machine})
    return table


def _row(one: Contender, scope: Scope, measured: Compared, args: Namespace, preset: Preset) -> dict[str, object]:
    first = one.profiles[0]
    return {
        "preset": args.preset,
        "scale": args.scale,
        "method": one.name,
        "compressor": spec.write(one.compressor) if one.compressor is not None else "",
        "scope": WORDS[scope],
        "visual_tokens_before": first.before,
        "visual_tokens": compact(first.visual),
        "text_tokens": first.text,
        "retention": f"{first.retention:.4f}",
        "compression_ratio": f"{first.compression_ratio:.3f}",
        **_quartiles("ms", measured.milliseconds, 2),
        **_quartiles("speed_up", measured.speed_up, 3),
        "flops": one.flops[scope],
        "flops_limit": f"{measured.limit:.3f}",
        **_quartiles("share_of_limit", measured.share, 3),
        **_quartiles("tokens_per_second", one.tokens_per_second, 2),
        "kv_bytes": one.kv_bytes,
        "peak_bytes": one.peak_bytes,
        "layers": preset.layers,
        "width": preset.width,
        "mlp": preset.mlp,
        "vision_layers": preset.vision_layers,
        "vision_width": preset.vision_width,
        "vision_mlp": preset.vision_mlp,
        "batch": args.batch,
        "new_tokens": args.new_tokens,
        "repeats": len(one.spans),
        "clock": args.clock,
        "dtype": args.dtype,
        "attention": args.attention,
        "note": "; ".join(filter(None, (one.note, one.without_peak))),
    }


def _quartiles(name: str, values: Quartiles, digits: int) -> dict[str, str]:
    texts = (f"{value:.{digits}f}" for value in values)
    return dict(zip((name, f"{name}_q1", f"{name}_q3"), texts, strict=True))


def doubts(found: list[Contender], args: Namespace, device: torch.device, *, narrow: bool) -> list[str]:
    """Return why the numbers may be unreliable or misleading.

    `narrow` says that the model is scaled down more than by default.
    """
    notes = []
    milliseconds = [compare(found[0], found[0], scope).milliseconds for scope in SCOPES]
    widest = max(milliseconds, key=lambda one: one.third / one.first)
    if widest.third / widest.first > BUSY:
        what = WORDS[SCOPES[milliseconds.index(widest)]]
        if device.type == "cuda":
            mend = "measure again while nothing else uses the GPU"
        elif args.clock == "cpu":
            mend = "measure again while nothing else runs, with OMP_NUM_THREADS=1 or with more --repeats"
        else:
            mend = "measure again while nothing else runs, or with --clock cpu and OMP_NUM_THREADS=1"
        notes.append(
            f"these timings are unreliable: the quartiles of the plain model's {what} are {widest.first:.0f} and"
            f" {widest.third:.0f} ms, so other work probably shares the processor; {mend}"
        )
    if narrow:
        notes.append(
            f"at --scale {args.scale} most of the time is overhead that no method can save, so the small model lowers"
            " the shares of the limit; use --scale 1/8 or more to compare methods"
        )
    return notes


def gaps(found: list[Contender], repeats: int) -> list[str]:
    """Return the requested figures that were not measured."""
    notes = []
    done = len(found[0].spans)
    if done < repeats:
        notes.append(f"the run was stopped after {done} of {repeats} rounds")
    if unmeasured := [one for one in found if one.without_peak]:
        notes.append(f"{unmeasured[0].without_peak} ({', '.join(one.name for one in unmeasured)})")
    return notes


def as_json(
    found: list[Contender], table: list[dict[str, object]], doubtful: list[str], path: Path | None
) -> dict[str, object]:
    missing = [{"method": one.name, "note": one.note} for one in found if not one.spans]
    return {"rows": table, "not_measured": missing, "notes": doubtful, "csv": str(path) if path else None}


def print_tables(
    found: list[Contender],
    args: Namespace,
    preset: Preset,
    device: torch.device,
    doubtful: list[str],
    path: Path | None,
) -> None:
    console, repeats = Console(highlight=False), len(found[0].spans)
    console.width = max(console.width, WIDTH)  # a narrower window wraps lines; truncated numbers would mislead
    console.print(Text(_title(args, preset, device), style="bold"), "", sep="\n")
    for scope, heading, columns in BLOCKS:
        console.print(Text(heading), _block(found, scope, columns, spread=repeats > 1), "", sep="\n")
    for number, one in enumerate(_noted(found), 1):
        console.print(Text(f"({number}) {one.name}: {one.note}"))
    clock = ", in seconds that the CPU computed" if args.clock == "cpu" else ""
    if repeats > 1:
        how = f"Medians of {repeats} interleaved rounds{clock}; speed-ups: ratios within a round, with quartiles."
    else:
        how = f"One round{clock}: it has no spread that tells how far to trust it; give more --repeats."
    console.print(
        Text(
            f"{how} limit: FLOPs of the plain model over FLOPs of the method, without selection. Peak memory is beyond"
            " the weights."
        )
    )
    for text in doubtful:
        console.print(Text(f"note: {text}"))
    if path:
        console.print(Text(f"written to {path}"), soft_wrap=True)


def _title(args: Namespace, preset: Preset, device: torch.device) -> str:
    size = f"LLM {preset.layers} x {preset.width}, encoder {preset.vision_layers} x {preset.vision_width}"
    tokens = f"{preset.visual_tokens:,} visual tokens and {args.text_tokens} of text"
    scaled = "" if args.scale == "1" else f", heads and MLPs at {args.scale}"
    return f"{args.preset}{scaled} ({size}), {tokens}, batch {args.batch}, {args.dtype}, {args.attention}, {device}"


def _block(found: list[Contender], scope: Scope | None, columns: tuple[str, ...], *, spread: bool) -> Table:
    """Return a table of some measurements, a row for each method. Names and numbers never wrap."""
    table = Table(box=None, pad_edge=False)
    table.add_column("method", no_wrap=True)
    for column in columns:
        words = column == "visual tokens"  # counts by layer may wrap between numbers
        header = Text(column.replace(" ", "\n"))
        table.add_column(header, justify="left" if words else "right", no_wrap=not words)
    for one in found:
        name = one.name + (f" ({_noted(found).index(one) + 1})" if one.note else "")
        if not one.spans:
            cells = [NOTHING] * len(columns)
        elif scope is None:
            peak = NOTHING if one.peak_bytes is None else show_bytes(one.peak_bytes)
            decoding = f"{one.tokens_per_second.median:.1f}"
            cells = [compact(one.profiles[0].visual), show_bytes(one.kv_bytes), peak, decoding]
        else:
            cells = _speed(compare(one, found[0], scope), spread)
        table.add_row(Text(_in_lines(name)), *map(Text, cells))
    return table


def _speed(measured: Compared, spread: bool) -> list[str]:
    speed_up = ("{:.2f}x ({:.2f}-{:.2f})" if spread else "{:.2f}x").format(*measured.speed_up)
    return [f"{measured.milliseconds.median:.1f}", speed_up, f"{measured.limit:.2f}x", f"{measured.share.median:.0%}"]


def _in_lines(name: str) -> str:
    """Return a long name in several lines, broken after commas and pluses, and elsewhere only without these."""
    lines = [""]
    for piece in re.findall(rf"[^,+]{{0,{NAME - 1}}}[,+]|[^,+]{{1,{NAME}}}", name):
        if len(lines[-1]) + len(piece) > NAME:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def _noted(found: list[Contender]) -> list[Contender]:
    return [one for one in found if one.note]
