"""The measurements of `bench`: rows of a CSV, JSON, and tables."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.text import Text

from vlmzip import spec
from vlmzip.lab.bench.bench import SCOPES, Compared, Contender, Scope, compare
from vlmzip.lab.bench.presets import Preset
from vlmzip.lab.bench.timing import Quartiles
from vlmzip.lab.table import ABSENT, Column, Console, Table, V, same, show_bytes
from vlmzip.runtime.report import compact
from vlmzip.runtime.token_profile import TokenProfile

WORDS: dict[Scope, str] = {"prefill": "LLM prefill", "ttft": "TTFT"}
#: The dimensions of a preset that are columns in CSV and JSON.
SIZES = ("layers", "width", "mlp", "vision_layers", "vision_width", "vision_mlp")
#: The width of a block, and of a method's name in it, in characters per line.
WIDTH, NAME = 80, 30
#: Third over first quartile of the plain model's times. Above this, other work probably shares the processor.
BUSY = 1.25


@dataclass(frozen=True)
class Measurement:
    """A scope of a method that ran."""

    contender: Contender
    scope: Scope
    compared: Compared


def table(
    contenders: Sequence[Contender], args: Namespace, preset: Preset, machine: Mapping[str, str]
) -> Table[Measurement]:
    """Return the measurements for CSV and JSON: two rows for each method that ran, one per scope."""
    ran = [contender for contender in contenders if contender.spans]
    rows = [
        Measurement(contender, scope, compare(contender, contenders[0], scope)) for contender in ran for scope in SCOPES
    ]
    columns: list[Column[Measurement]] = [
        *_same({"preset": args.preset, "scale": args.scale}),
        _column("method", lambda row: row.contender.name),
        _column("compressor", lambda row: spec.write(row.contender.compressor) if row.contender.compressor else ""),
        _column("scope", lambda row: WORDS[row.scope]),
        _column("visual_tokens_before", lambda row: _first(row).before),
        _column("visual_tokens", lambda row: compact(_first(row).visual)),
        _column("text_tokens", lambda row: _first(row).text),
        _column("retention", lambda row: _first(row).retention, "{:.4f}".format),
        _column("compression_ratio", lambda row: _first(row).compression_ratio, "{:.3f}".format),
        *_quartiles("ms", lambda row: row.compared.milliseconds, "{:.2f}".format),
        *_quartiles("speed_up", lambda row: row.compared.speed_up, "{:.3f}".format),
        _column("flops", lambda row: row.contender.flops[row.scope]),
        _column("flops_limit", lambda row: row.compared.limit, "{:.3f}".format),
        *_quartiles("share_of_limit", lambda row: row.compared.share, "{:.3f}".format),
        *_quartiles("tokens_per_second", lambda row: row.contender.tokens_per_second, "{:.2f}".format),
        _column("kv_bytes", lambda row: row.contender.kv_bytes),
        _column("peak_bytes", lambda row: row.contender.peak_bytes),
        *_same({name: getattr(preset, name) for name in SIZES}),
        *_same({"batch": args.batch, "new_tokens": args.new_tokens}),
        _column("repeats", lambda row: len(row.contender.spans)),
        *_same({"clock": args.clock, "dtype": args.dtype, "attention": args.attention}),
        _column("note", lambda row: "; ".join(filter(None, (row.contender.note, row.contender.without_peak)))),
        *_same(machine),
    ]
    return Table(columns, rows)


def _column(
    name: str, value: Callable[[Measurement], V], cell: Callable[[V], object] = lambda value: value
) -> Column[Measurement]:
    """Return a column with one name for JSON and CSV."""
    return Column(value, key=name, csv=(name,), cells=cell)


def _quartiles(
    name: str, value: Callable[[Measurement], Quartiles], cell: Callable[[float], str]
) -> list[Column[Measurement]]:
    return [
        _column(name, lambda row: value(row).median, cell),
        _column(f"{name}_q1", lambda row: value(row).first, cell),
        _column(f"{name}_q3", lambda row: value(row).third, cell),
    ]


def _same(values: Mapping[str, object]) -> list[Column[Measurement]]:
    """Return columns whose value is the same in every row."""
    return [same(name, value, key=name) for name, value in values.items()]


def _first(row: Measurement) -> TokenProfile:
    """Return the token profile of the batch's first row."""
    return row.contender.profiles[0]


def doubts(contenders: list[Contender], args: Namespace, device: torch.device, *, narrow: bool) -> list[str]:
    """Return why the numbers may be unreliable or misleading.

    `narrow` says that the model is scaled down more than by default.
    """
    notes = []
    milliseconds = [compare(contenders[0], contenders[0], scope).milliseconds for scope in SCOPES]
    widest = max(milliseconds, key=lambda quartiles: quartiles.third / quartiles.first)
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


def gaps(contenders: list[Contender], repeats: int) -> list[str]:
    """Return the requested figures that were not measured."""
    notes = []
    done = len(contenders[0].spans)
    if done < repeats:
        notes.append(f"the run was stopped after {done} of {repeats} rounds")
    if unmeasured := [contender for contender in contenders if contender.without_peak]:
        notes.append(f"{unmeasured[0].without_peak} ({', '.join(contender.name for contender in unmeasured)})")
    return notes


def as_json(
    contenders: list[Contender], table: Table[Measurement], doubtful: list[str], path: Path | None
) -> dict[str, object]:
    missing = [{"method": contender.name, "note": contender.note} for contender in contenders if not contender.spans]
    return {"rows": table.as_json(), "not_measured": missing, "notes": doubtful, "csv": str(path) if path else None}


def print_tables(
    contenders: list[Contender],
    args: Namespace,
    preset: Preset,
    device: torch.device,
    doubtful: list[str],
    path: Path | None,
) -> None:
    console, repeats = Console(highlight=False), len(contenders[0].spans)
    console.width = max(console.width, WIDTH)  # a narrower window wraps lines; truncated numbers would mislead
    console.print(Text(_title(args, preset, device), style="bold"), "", sep="\n")
    for heading, block in (
        ("LLM prefill, with output head", _speed(contenders, "prefill", spread=repeats > 1)),
        ("TTFT: from the call to the first token", _speed(contenders, "ttft", spread=repeats > 1)),
        ("Memory and decoding", _memory(contenders)),
    ):
        console.print(Text(heading), block.rich(), "", sep="\n")
    for number, contender in enumerate(_noted(contenders), 1):
        console.print(Text(f"({number}) {contender.name}: {contender.note}"))
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


def _speed(contenders: list[Contender], scope: Scope, *, spread: bool) -> Table[Contender]:
    """Return the times of a scope as a table for people, a row for each method."""

    def compared(contender: Contender) -> Compared:
        return compare(contender, contenders[0], scope)

    with_quartiles = "{:.2f}x ({:.2f}-{:.2f})" if spread else "{:.2f}x"
    columns = [
        _names(contenders),
        _number("ms", lambda contender: compared(contender).milliseconds.median, "{:.1f}".format),
        _number(
            "speed-up", lambda contender: compared(contender).speed_up, lambda ratios: with_quartiles.format(*ratios)
        ),
        _number("limit", lambda contender: compared(contender).limit, "{:.2f}x".format),
        _number("share of limit", lambda contender: compared(contender).share.median, "{:.0%}".format),
    ]
    return Table(columns, contenders)


def _memory(contenders: list[Contender]) -> Table[Contender]:
    """Return tokens, memory and decoding speed as a table for people, a row for each method."""
    tokens: Column[Contender] = Column(  # counts by layer may wrap between numbers
        lambda contender: compact(contender.profiles[0].visual) if contender.spans else ABSENT,
        _in_words("visual tokens"),
    )
    columns = [
        _names(contenders),
        tokens,
        _number("KV cache", lambda contender: contender.kv_bytes, show_bytes),
        _number("peak memory", lambda contender: contender.peak_bytes, show_bytes),
        _number("tokens/s", lambda contender: contender.tokens_per_second.median, "{:.1f}".format),
    ]
    return Table(columns, contenders)


def _names(contenders: list[Contender]) -> Column[Contender]:
    """Return the column of the methods' names, with the number of a footnote."""
    noted = _noted(contenders)

    def name(contender: Contender) -> str:
        return _in_lines(contender.name + (f" ({noted.index(contender) + 1})" if contender.note else ""))

    return Column(name, "method", wraps=False)


def _number(heading: str, value: Callable[[Contender], V | None], text: Callable[[V], str]) -> Column[Contender]:
    """Return a column of numbers for methods that ran. Numbers never wrap."""
    return Column(
        lambda contender: value(contender) if contender.spans else ABSENT,
        _in_words(heading),
        text,
        align="right",
        wraps=False,
    )


def _in_words(heading: str) -> str:
    """Return a heading with a word per line, so that columns stay narrow."""
    return heading.replace(" ", "\n")


def _in_lines(name: str) -> str:
    """Return a long name in several lines, broken after commas and pluses, and elsewhere only without these."""
    lines = [""]
    for piece in re.findall(rf"[^,+]{{0,{NAME - 1}}}[,+]|[^,+]{{1,{NAME}}}", name):
        if len(lines[-1]) + len(piece) > NAME:
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def _noted(contenders: list[Contender]) -> list[Contender]:
    return [contender for contender in contenders if contender.note]
