"""Measure the cost of each method's selection at 576, 2,880 and 18,432 visual tokens, relative to CLIP ViT-L/14-336.

    python -m recipes.benchmarks.selection_by_method

Inputs are random visual tokens of CLIP ViT-L's width (1,024) and random signals, for an image of 1, 5 or 32 frames of
24 x 24 tokens. The script times `method(tokens).apply(features)`; computing the signals has separate rows
("signal: ..."). Each method keeps 64 tokens, and then a ninth. All variants and the encoder take turns in one run;
ratios are medians of the ratios within each round. Peak memory is measured in a new process for each. It writes
benchmarks/results/selection-by-method.csv. --check fails if a cost that should be linear in the tokens grows faster.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from recipes.benchmarks import RESULTS
from vlmzip import Grid, KMeans, LLaVolta, RandomTokens, Site, VisionZip, VisualTokens, catalogue
from vlmzip.compressor import Compressor, Profile
from vlmzip.errors import UserError
from vlmzip.files import write_csv
from vlmzip.lab.bench.memory import FRUGAL, peak_bytes
from vlmzip.lab.bench.timing import interleaved, quartiles
from vlmzip.lab.machine import about
from vlmzip.models.recording import attention_received, attention_rows, cls_attention_row, mean_over_heads

WIDTH, HEADS, QUESTION, LAYERS = 1024, 16, 20, 32
SIZES = {576: Grid(1, 24, 24), 2880: Grid(5, 24, 24), 18432: Grid(32, 24, 24)}
KEEPS = {"64 tokens": 64, "a ninth": 1 / 9}
#: Not here: chain is the sum of its parts, downsample and no_compression select nothing, and resamplers are networks.
LEFT_OUT = ("chain", "downsample", "no_compression")
VARIANTS: list[Compressor] = [VisionZip(merge="mean"), LLaVolta(window="2d"), RandomTokens(site=Site.IN_LLM, layer=2)]
VARIANTS += [KMeans(site=Site.IN_LLM)]
Run = Callable[[], object]


def visual_tokens(size: int) -> VisualTokens:
    """Return random tokens with all signals.

    The projector is one layer. LLaVA-1.5-7B's is 20 times as large, and methods that run it take as much longer there.
    """
    torch.manual_seed(0)
    projector = nn.Linear(WIDTH, WIDTH)
    attention = torch.randn(1, QUESTION, size).softmax(-1)
    return VisualTokens(
        features=torch.randn(1, size, WIDTH), grid=SIZES[size], passes_prefix=True,
        cls_attention=torch.randn(1, size).softmax(-1), keys=torch.randn(1, size, WIDTH // HEADS),
        text_attention=attention, query_mask=torch.ones(1, QUESTION, dtype=torch.bool),
        text_features=torch.randn(1, QUESTION, WIDTH), llm_input=torch.randn(1, size, WIDTH),
        attention_received=torch.rand(1, size, 2), last_cls_attention=torch.randn(1, size).softmax(-1),
        last_keys=torch.randn(1, size, WIDTH), encoder_features=torch.randn(1, size, WIDTH), projector=projector,
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


def selections(size: int) -> Iterator[tuple[tuple[str, str, str], Run]]:
    tokens = visual_tokens(size)
    for name, setting, method in methods():
        for keep_name, keep in KEEPS.items():
            try:
                chosen = method.at_budget(keep, Profile(SIZES[size], LAYERS))[0]
            except UserError:  # no such budget, or its threshold decides: once, as it comes
                if keep_name != "64 tokens":
                    continue
                chosen, keep_name = method, ""
            own = tokens.replace(layer=min(chosen.layers, default=None))
            yield (name, setting, keep_name), lambda chosen=chosen, own=own: chosen(own).apply(own.features)


def signals(size: int) -> Iterator[tuple[tuple[str, str, str], Run]]:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, size, WIDTH)
    asking = torch.randn(1, HEADS, QUESTION, WIDTH // HEADS)
    by_head, allowed = key.unflatten(-1, (HEADS, -1)).transpose(1, 2), torch.ones(1, QUESTION, size, dtype=torch.bool)
    yield ("signal: attention of CLS", "", ""), lambda: cls_attention_row(query, key, HEADS, 0.125)
    yield ("signal: keys", "", ""), lambda: mean_over_heads(key, HEADS)
    yield ("signal: attention of the question", "", ""), lambda: attention_rows(asking, by_head, allowed, 0.125)
    if size == max(SIZES):
        return  # attention received is a sum over all pairs: minutes, and nothing new
    yield ("signal: attention received", "", ""), lambda: attention_received(query, key, HEADS, 0.125)


def encoder() -> Run:
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=24, num_attention_heads=HEADS,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    model, pixels = CLIPVisionModel(config).eval(), torch.randn(1, 3, 336, 336)
    return lambda: model(pixels)


def runs_at(size: int) -> dict[str, Run]:
    return {" | ".join((*key, str(size))): run for key, run in (*selections(size), *signals(size))}


def memory_of(variant: str) -> int:
    command = [sys.executable, "-m", "recipes.benchmarks.selection_by_method", "--memory-of", variant]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | FRUGAL)
    return int(out.stdout)


def print_memory_of(variant: str) -> None:
    run = encoder() if variant == "encoder" else runs_at(int(variant.rpartition(" | ")[2]))[variant]
    print(peak_bytes(torch.inference_mode()(run)))


def rows_of(seconds: dict[str, list[float]]) -> Iterator[dict[str, object]]:
    base = memory_of("encoder")
    machine = about()
    for variant, own in seconds.items():
        if variant == "encoder":
            continue
        name, setting, keep, size = variant.split(" | ")
        ratio = quartiles([a / b for a, b in zip(own, seconds["encoder"], strict=True)])
        memory = memory_of(variant)
        yield {
            "method": name, "setting": setting, "keep": keep, "tokens": int(size),
            "time_over_encoder": f"{ratio.median:.5f}", "first_quartile": f"{ratio.first:.5f}",
            "third_quartile": f"{ratio.third:.5f}", "milliseconds": f"{1000 * quartiles(own).median:.3f}",
            "memory_over_encoder": f"{memory / base:.3f}", "peak_mib": f"{memory / 2**20:.1f}",
            "encoder_milliseconds": f"{1000 * quartiles(seconds['encoder']).median:.1f}",
            "encoder_peak_mib": f"{base / 2**20:.1f}", "repeats": len(own), **machine,
        }  # fmt: skip


def growth(rows: list[dict[str, object]], what: str) -> dict[tuple[str, str, str], float]:
    """The power of the token count with which time or memory grows from 2,880 to 18,432 tokens."""
    at = {(r["method"], r["setting"], r["keep"], r["tokens"]): float(str(r[what])) for r in rows}
    grown = math.log(18432 / 2880)
    keys = dict.fromkeys((str(r["method"]), str(r["setting"]), str(r["keep"])) for r in rows)
    both = [key for key in keys if (*key, 2880) in at and (*key, 18432) in at]
    return {key: math.log(max(at[*key, 18432], 1e-9) / max(at[*key, 2880], 1e-9)) / grown for key in both}


def may_exceed_linear(name: str, keep: str) -> bool:
    """Return whether the method's cost grows faster than the tokens; a ninth of them grows with them."""
    methods = catalogue.available()
    cost = methods[name].cost if name in methods else "N"
    return cost in ("N²", "k·N²", "N³") or (keep == "a ninth" and "k" in cost)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "selection-by-method.csv")
    parser.add_argument("--check", action="store_true", help="fail if something grows faster than it should")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print_memory_of(args.memory_of)
        return
    variants = {"encoder": encoder()} | {name: run for size in SIZES for name, run in runs_at(size).items()}
    with torch.inference_mode():
        rows = list(rows_of(interleaved(variants, args.repeats)))
    write_csv(args.out, rows)
    times, memories = growth(rows, "milliseconds"), growth(rows, "peak_mib")
    print(
        "| method | setting | keep | 576 | 2,880 | 18,432 | grows with tokens to the power |",
        "| --- " * 7 + "|",
        sep="\n",
    )
    for key in dict.fromkeys((str(r["method"]), str(r["setting"]), str(r["keep"])) for r in rows):
        mine = {r["tokens"]: r for r in rows if (r["method"], r["setting"], r["keep"]) == key}
        cells = [
            f"{float(str(mine[n]['time_over_encoder'])):.2%} / {mine[n]['memory_over_encoder']}" if n in mine else ""
            for n in SIZES
        ]
        power = f"{times[key]:.2f} / {memories[key]:.2f}" if key in times else ""
        print(f"| {' | '.join((*key, *cells))} | {power} |")
    print(f"written to {args.out}")
    wrong = [key for key, power in times.items() if power > 1.5 and not may_exceed_linear(key[0], key[2])]
    if args.check and wrong:
        sys.exit(f"grows faster than the tokens: {wrong}")


if __name__ == "__main__":
    main()
