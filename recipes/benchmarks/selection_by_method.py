"""Measure the cost of each method's selection at 576, 2,880 and 18,432 visual tokens, relative to CLIP ViT-L/14-336.

    OMP_NUM_THREADS=1 python -m recipes.benchmarks.selection_by_method

Inputs are random visual tokens of CLIP ViT-L's width (1,024) and random signals, for 1, 5 or 32 views or frames of
24 x 24 tokens. The script times `method(tokens).apply(features)`; computing the signals has separate rows
("signal: ..."). Each method keeps 64 tokens, and then a ninth.

Times are the CPU time of the process, because other processes may use the same cores. All variants of a size and the
encoder, on one image, take turns; ratios are medians of the ratios within each round. The encoder works on each view
separately, so its time for the same input is that of one image times the views. A run that takes longer than `LONG`
seconds is not repeated. A run is stopped after `LIMIT` seconds, and not begun if the next smaller input shows that it
would take longer. Peak memory is that of the same run for long ones, and of a run in a fresh process for others.

It writes benchmarks/results/selection-by-method.csv after each size. With --tokens it measures only some sizes, and
leaves the other rows of the file. --check fails if a time grows faster than the method's cost.
"""

from __future__ import annotations

import argparse
import csv
import gc
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from recipes.benchmarks import RESULTS
from vlmzip import (
    Grid,
    LLaVolta,
    PruMerge,
    RandomTokens,
    Signal,
    Site,
    VisionZip,
    VisualTokens,
    ZOOPrune,
    catalogue,
)
from vlmzip.compressor import Compressor, Profile
from vlmzip.errors import UserError
from vlmzip.files import write_csv
from vlmzip.lab.bench.memory import in_frugal_process, peak_bytes
from vlmzip.lab.bench.timing import cpu_seconds, interleaved, quartiles
from vlmzip.lab.machine import about
from vlmzip.models.recording import attention_received, attention_rows, cls_attention_row, mean_over_heads

WIDTH, LLM_WIDTH, HEADS, QUESTION, LAYERS = 1024, 4096, 16, 20, 32
SIZES = {576: Grid(1, 24, 24), 2880: Grid(5, 24, 24), 18432: Grid(32, 24, 24)}
REPEATS = {576: 4, 2880: 2, 18432: 1}
#: CPU seconds: a longer run is not repeated, and a run that exceeds the limit is stopped.
LONG, LIMIT = 3, 50
#: Shorter runs are repeated before their memory is measured: the first use of a library shows in small numbers.
SHORT = 0.5
KEEPS = {"64 tokens": 64, "a ninth": 1 / 9}
#: Not here: chain is the sum of its parts, downsample and no_compression select nothing, and resamplers are networks.
LEFT_OUT = ("chain", "downsample", "no_compression")
VARIANTS: list[Compressor] = [VisionZip(merge="mean"), LLaVolta(window="2d"), RandomTokens(site=Site.IN_LLM, layer=2)]
VARIANTS += [PruMerge(plus=True), ZOOPrune(directions=1)]
#: The power of the tokens with which a cost grows, for a fixed number of kept tokens and for a share of them. Applying
#: the map is linear.
ORDERS = {
    "1": (1, 1), "N": (1, 1), "N·log N": (1, 1), "N·k": (1, 2), "N·k²": (1, 3), "N²": (2, 2), "k·N²": (2, 3),
    "N³": (3, 3),
}  # fmt: skip
Key = tuple[str, str, str]
Run = Callable[[], object]


def visual_tokens(size: int) -> VisualTokens:
    """Return random tokens with all signals. The projector has the size of LLaVA-1.5-7B's."""
    torch.manual_seed(0)
    projector = nn.Sequential(nn.Linear(WIDTH, LLM_WIDTH), nn.GELU(), nn.Linear(LLM_WIDTH, LLM_WIDTH))
    attention = torch.randn(1, QUESTION, size).softmax(-1)
    return VisualTokens(
        features=torch.randn(1, size, WIDTH), grid=SIZES[size], passes_prefix=True,
        cls_attention=torch.randn(1, size).softmax(-1), keys=torch.randn(1, size, WIDTH // HEADS),
        text_attention=attention, query_mask=torch.ones(1, QUESTION, dtype=torch.bool),
        text_features=torch.randn(1, QUESTION, WIDTH), llm_input=torch.randn(1, size, WIDTH),
        attention_received=torch.rand(1, size, 2), last_cls_attention=torch.randn(1, size).softmax(-1),
        last_keys=torch.randn(1, size, WIDTH), encoder_features=torch.randn(1, size, WIDTH), projector=projector,
        llm_keys=torch.randn(1, size, WIDTH), text_keys=torch.randn(1, QUESTION, WIDTH),
        llm_states=torch.randn(1, size, WIDTH), text_states=torch.randn(1, QUESTION, WIDTH),
    )  # fmt: skip


def methods() -> Iterator[tuple[str, str, Compressor]]:
    """Name, setting and method; settings of the defaults are empty."""
    for name, cls in catalogue.available().items():
        if name not in LEFT_OUT and not cls.trained_weights:
            yield name, "", catalogue.make(cls, {})
    for method in VARIANTS:
        usual = catalogue.make(type(method), {})
        told = [f for f in method.field_names() if getattr(method, f) != getattr(usual, f)]
        yield method.name(), " ".join(f"{f}={getattr(method, f)}" for f in told), method


def applied(method: Compressor, tokens: VisualTokens) -> object:
    return method(tokens).apply(tokens.features)


def selections(size: int) -> Iterator[tuple[Key, Run]]:
    tokens = visual_tokens(size)
    for name, setting, method in methods():
        budgets: dict[str, Compressor] = {}
        for keep_name, keep in KEEPS.items():
            if keep_name == "64 tokens" and isinstance(method, ZOOPrune):
                continue  # running the projector takes the time, whatever the budget
            try:
                budgets[keep_name] = method.at_budget(keep, Profile(SIZES[size], LAYERS))[0]
            except UserError:  # no such budget at this size
                continue
        for keep_name, chosen in (budgets or {"": method}).items():  # without a budget: its default settings
            own = tokens.replace(layer=min(chosen.layers, default=None))
            if Signal.CANDIDATE_ATTENTION in chosen.needs:
                outputs = chosen.candidates(own).max_length
                own = own.replace(candidate_attention=torch.randn(1, QUESTION, outputs).softmax(-1))
            yield (name, setting, keep_name), partial(applied, chosen, own)


def signals(size: int) -> Iterator[tuple[Key, Run]]:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, size, WIDTH)
    asking = torch.randn(1, HEADS, QUESTION, WIDTH // HEADS)
    by_head, allowed = key.unflatten(-1, (HEADS, -1)).transpose(1, 2), torch.ones(1, QUESTION, size, dtype=torch.bool)
    yield ("signal: attention of CLS", "", ""), lambda: cls_attention_row(query, key, HEADS, 0.125)
    yield ("signal: keys", "", ""), lambda: mean_over_heads(key, HEADS)
    yield ("signal: attention of the question", "", ""), lambda: attention_rows(asking, by_head, allowed, 0.125)
    yield ("signal: attention received", "", ""), lambda: attention_received(query, key, HEADS, 0.125)


def encoder() -> Run:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=24, num_attention_heads=HEADS,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    model, pixels = CLIPVisionModel(config).eval(), torch.randn(1, 3, 336, 336)
    return lambda: model(pixels)


def runs_at(size: int) -> dict[Key, Run]:
    return dict((*selections(size), *signals(size)))


class TooLong(Exception):
    """A run exceeded the limit."""


class First(NamedTuple):
    """The CPU seconds and the peak memory of a variant's first run."""

    seconds: float
    peak: int

    @property
    def long(self) -> bool:
        return self.seconds > LONG


def first_run(run: Run) -> First | None:
    """Return what a first run took, or `None` if it was stopped at the limit."""
    seconds = []

    def timed() -> None:
        start = cpu_seconds()
        run()
        seconds.append(cpu_seconds() - start)

    # Again every second: an exception that a finaliser happens to run into is ignored.
    signal.setitimer(signal.ITIMER_PROF, LIMIT, 1.0)
    try:
        peak = peak_bytes(timed, warm_up=False)
    except TooLong:
        return None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return First(seconds[0], peak)


def stop(*_: object) -> None:
    raise TooLong


def first_runs(runs: Mapping[Key, Run], size: int, smaller: Mapping[Key, First | None]) -> dict[Key, First | None]:
    """Return the first run of each variant. `smaller` has those of the next smaller size."""
    first: dict[Key, First | None] = {}
    for key, run in runs.items():
        before = smaller.get(key, First(0, 0))
        too_long = before is None or before.seconds * size / (previous(size) or size) > LIMIT
        first[key] = None if too_long else first_run(run)
        print(f"{size:,} tokens: {' '.join(key)}: {first[key] or 'not measured'}", file=sys.stderr)
    return first


def times_at(
    runs: Mapping[Key, Run], size: int, first: Mapping[Key, First | None], encode: Run
) -> tuple[list[float], dict[Key, list[float]]]:
    """Return the seconds of the encoder's runs, and of each variant's."""
    short = {key: runs[key] for key, measured in first.items() if measured and not measured.long}
    encode()
    named: dict[str, Run] = {"encoder": encode} | {" | ".join(key): run for key, run in short.items()}
    seconds = interleaved(named, REPEATS[size], warmup=0, clock=cpu_seconds)
    own = {
        key: seconds[" | ".join(key)] if key in short else [measured.seconds]
        for key, measured in first.items()
        if measured
    }
    return seconds["encoder"], own


def peaks(size: int, first: Mapping[Key, First]) -> Iterator[int]:
    """Yield the peak memory of each variant."""
    gc.freeze()
    with torch.inference_mode():
        runs = runs_at(size)
        for key, measured in first.items():
            yield measured.peak if measured.long else peak_bytes(runs[key], warm_up=measured.seconds < SHORT)


def rows_at(
    size: int, first: Mapping[Key, First | None], plain: list[float], seconds: Mapping[Key, list[float]]
) -> list[dict[str, str]]:
    """Return the rows of a size. `plain` has the times of the encoder."""
    ran = {key: measured for key, measured in first.items() if measured}
    memory = in_frugal_process(peaks, size, ran)
    always = {
        "encoder_milliseconds": f"{1000 * quartiles(plain).median:.1f}",
        "clock": "CPU seconds of the process",
        **about(),
    }
    rows = [columns(key, size) | {"repeats": "0", "note": f"more than {LIMIT} s"} for key in first if key not in ran]
    for key, peak in zip(ran, memory, strict=True):
        own = seconds[key]
        paired = plain if len(own) == len(plain) else [quartiles(plain).median] * len(own)
        ratio = quartiles([a / b for a, b in zip(own, paired, strict=True)])
        rows.append(
            columns(key, size) | {
                "time_over_encoder": f"{ratio.median:.5f}", "first_quartile": f"{ratio.first:.5f}",
                "third_quartile": f"{ratio.third:.5f}",
                "time_over_encoder_of_input": f"{ratio.median / SIZES[size].frames:.5f}",
                "milliseconds": f"{1000 * quartiles(own).median:.3f}", "peak_mib": f"{peak / 2**20:.1f}",
                "repeats": str(len(own)),
            }
        )  # fmt: skip
    return [row | always for row in sorted(rows, key=lambda row: list(first).index(key_of(row)))]


def key_of(row: Mapping[str, str]) -> Key:
    return row["method"], row["setting"], row["keep"]


def columns(key: Key, size: int) -> dict[str, str]:
    """Return all columns of a row, those for measurements empty."""
    named = dict(zip(("method", "setting", "keep"), key, strict=True)) | {"tokens": str(size)}
    named["views"] = str(SIZES[size].frames)
    measured = (
        "time_over_encoder", "first_quartile", "third_quartile", "time_over_encoder_of_input", "milliseconds",
        "peak_mib", "encoder_milliseconds", "repeats", "note",
    )  # fmt: skip
    return named | dict.fromkeys(measured, "")


def growth(rows: list[dict[str, str]], what: str) -> dict[Key, float]:
    """Return the power of the tokens with which time or memory grows from 2,880 to 18,432 tokens."""
    at = {(*key_of(row), int(row["tokens"])): float(row[what]) for row in rows if row[what]}
    grown = math.log(18432 / 2880)
    keys = dict.fromkeys(map(key_of, rows))
    both = [key for key in keys if (*key, 2880) in at and (*key, 18432) in at]
    return {key: math.log(max(at[*key, 18432], 1e-9) / max(at[*key, 2880], 1e-9)) / grown for key in both}


def order(key: Key) -> int:
    """Return the power of the tokens with which a variant's time should grow."""
    name, _, keep = key
    methods = catalogue.available()
    if name not in methods:
        return 2 if name == "signal: attention received" else 1
    return ORDERS[methods[name].cost][keep == "a ninth"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS / "selection-by-method.csv")
    parser.add_argument("--tokens", type=int, choices=SIZES, nargs="+", default=list(SIZES))
    parser.add_argument("--check", action="store_true", help="fail if something grows faster than it should")
    args = parser.parse_args()
    signal.signal(signal.SIGPROF, stop)
    gc.freeze()  # collecting the garbage before each measurement of memory is then fast
    encode = encoder()
    rows: list[dict[str, str]] = others(args.out, args.tokens)
    first: dict[Key, First | None] = {}
    for size in args.tokens:
        with torch.inference_mode():
            runs = runs_at(size)
            first = first_runs(runs, size, first)
            plain, seconds = times_at(runs, size, first, encode)
        rows += rows_at(size, first, plain, seconds)
        rows.sort(key=lambda row: int(row["tokens"]))
        write_csv(args.out, rows)
    print(f"written to {args.out}")
    # Times of linear methods grow with powers of up to 1.8, because large inputs do not fit the processor's caches.
    wrong = {key: power for key, power in growth(rows, "milliseconds").items() if power > order(key) + 0.9}
    if args.check and wrong:
        sys.exit(f"grows faster than its cost: {wrong}")


def others(path: Path, sizes: list[int]) -> list[dict[str, str]]:
    """Return the rows of a file that are not of these sizes."""
    if set(sizes) == set(SIZES) or not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if int(row["tokens"]) not in sizes]


def previous(size: int) -> int | None:
    """Return the next smaller size."""
    return max((other for other in SIZES if other < size), default=None)


if __name__ == "__main__":
    main()
