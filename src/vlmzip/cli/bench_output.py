"""What `bench` measured, as rows of a CSV, as JSON and as a table."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmzip import spec
from vlmzip.cli.tables import show_bytes
from vlmzip.measure.bench import SCOPES, Compared, Contender, Scope, compare
from vlmzip.measure.presets import Preset
from vlmzip.measure.timing import Quartiles
from vlmzip.runtime.report import compact

WORDS: dict[Scope, str] = {"prefill": "LLM prefill", "ttft": "TTFT"}
COLUMNS = (
    "method", "time of", "visual tokens", "ms", "speed-up (quartiles)", "limit", "share of limit", "KV cache",
    "peak memory", "tokens/s",
)  # fmt: skip


def rows(found: list[Contender], args: Namespace, preset: Preset, machine: Mapping[str, str]) -> list[dict[str, Any]]:
    """Two rows for each method that ran."""
    plain = found[0]
    table = []
    for one in found:
        for scope in SCOPES if one.spans else ():
            table.append(_row(one, scope, compare(one, plain, scope), args, preset) | {**machine})
    return table


def _row(one: Contender, scope: Scope, measured: Compared, args: Namespace, preset: Preset) -> dict[str, Any]:
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
        "repeats": args.repeats,
        "clock": args.clock,
        "dtype": args.dtype,
        "attention": args.attention,
        "note": one.note,
    }


def _quartiles(name: str, values: Quartiles, digits: int) -> dict[str, str]:
    texts = (f"{value:.{digits}f}" for value in values)
    return dict(zip((name, f"{name}_q1", f"{name}_q3"), texts, strict=True))


def as_json(found: list[Contender], table: list[dict[str, Any]], path: Path | None) -> dict[str, Any]:
    missing = [{"method": one.name, "note": one.note} for one in found if not one.spans]
    return {"rows": table, "not_measured": missing, "csv": str(path) if path else None}


def print_tables(
    found: list[Contender], args: Namespace, preset: Preset, device: torch.device, path: Path | None
) -> None:
    console = Console(highlight=False)
    console.print(Text(_title(args, preset, device), style="bold"), "", _table(found), "", sep="\n")
    for number, one in enumerate(_noted(found), 1):
        console.print(Text(f"({number}) {one.name}: {one.note}"))
    clock = ", in seconds that the CPU computed" if args.clock == "cpu" else ""
    console.print(
        Text(
            f"Medians of {args.repeats} interleaved rounds{clock}; speed-ups are ratios within a round. limit: FLOPs of"
            " the plain model over FLOPs of the method, without selection. LLM prefill: with output head; TTFT: from"
            " the call to the first token. Peak memory is beyond the weights."
        )
    )
    if path:
        console.print(Text(f"written to {path}"))


def _title(args: Namespace, preset: Preset, device: torch.device) -> str:
    size = f"LLM {preset.layers} x {preset.width}, encoder {preset.vision_layers} x {preset.vision_width}"
    tokens = f"{preset.visual_tokens:,} visual tokens and {args.text_tokens} of text"
    scaled = "" if args.scale == "1" else f", heads and MLPs at {args.scale}"
    return f"{args.preset}{scaled} ({size}), {tokens}, batch {args.batch}, {args.dtype}, {args.attention}, {device}"


def _table(found: list[Contender]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        words = column in ("method", "time of", "visual tokens")
        table.add_column(
            Text(column), justify="left" if words else "right", no_wrap=column == "time of", overflow="fold"
        )
    for one in found:
        name = one.name + (f" ({_noted(found).index(one) + 1})" if one.note else "")
        if not one.spans:
            table.add_row(Text(name), *["—"] * (len(COLUMNS) - 1))
            continue
        for scope in SCOPES:
            measured = compare(one, found[0], scope)
            first = scope == SCOPES[0]
            peak = "—" if one.peak_bytes is None else show_bytes(one.peak_bytes)
            costs = (show_bytes(one.kv_bytes), peak, f"{one.tokens_per_second.median:.1f}")
            table.add_row(
                Text(name if first else ""),
                WORDS[scope],
                compact(one.profiles[0].visual) if first else "",
                f"{measured.milliseconds.median:.1f}",
                "{:.2f}x ({:.2f}-{:.2f})".format(*measured.speed_up),
                f"{measured.limit:.2f}x",
                f"{measured.share.median:.0%}",
                *(costs if first else ("", "", "")),
            )
    return table


def _noted(found: list[Contender]) -> list[Contender]:
    return [one for one in found if one.note]
