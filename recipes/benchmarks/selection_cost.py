"""Measure the cost of VisionZip's selection: time and peak memory of the vision encoder with and without it.

    python -m recipes.benchmarks.selection_cost            # CLIP ViT-L/14-336 with random weights, on a GPU or the CPU

Three variants are interleaved in one run, so that noise affects them equally:

* plain:     the vision encoder with SDPA, keeping no hidden states;
* visionzip: the same, and the attention row, keys, selection and merging of VisionZip at 64 tokens;
* eager:     eager attention with `output_attentions=True`, as the published implementations run the encoder, without
             the additional cost of their selection.

It writes one row per variant to benchmarks/results/, with hardware and versions in the file name.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from recipes.benchmarks import RESULTS
from vlmzip import Signal, Site, VisionZip
from vlmzip.files import write_csv
from vlmzip.lab.bench.memory import FRUGAL, peak_bytes
from vlmzip.lab.bench.timing import now
from vlmzip.lab.machine import commit, file_name
from vlmzip.models import family_of

VARIANTS = ("plain", "visionzip", "eager")
METHOD = VisionZip(keep=64)


def build(args: argparse.Namespace) -> LlavaForConditionalGeneration:
    """Make LLaVA-1.5's vision encoder and projector, with a minimal LLM that never runs."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=args.layers, num_attention_heads=16,
        image_size=336, patch_size=14, projection_dim=768,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=32, pad_token_id=0
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=31))
    return model.to(args.device, getattr(torch, args.dtype)).eval()


def variant(name: str, args: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """Return a function that runs the variant once and returns the seconds of each part."""
    model = build(args)
    pixels = torch.randn(args.batch, 3, 336, 336, device=args.device, dtype=getattr(torch, args.dtype))
    family = family_of(model)
    model.set_attn_implementation("eager" if name == "eager" else "sdpa")
    needs = frozenset({Signal.CLS_ATTENTION, Signal.KEYS})

    def run() -> dict[str, float]:
        start = now(args.device)
        if name == "visionzip":
            (group,) = family.encode({"pixel_values": pixels}, Site.PRE_PROJECTOR, needs).groups
            encoded = now(args.device)
            METHOD(group.tokens).apply(group.tokens.features)
            end = now(args.device)
            return {"seconds": end - start, "selection": end - encoded}
        tower = model.model.vision_tower
        eager = name == "eager"
        tower(pixels, output_hidden_states=eager, output_attentions=eager)
        return {"seconds": now(args.device) - start, "selection": 0.0}

    return torch.inference_mode()(run)


def memory_in_a_fresh_process(name: str, arguments: list[str]) -> int:
    """Return the peak memory without memory that other variants left in the allocator, which frees memory at once."""
    command = [sys.executable, "-m", "recipes.benchmarks.selection_cost", *arguments, "--memory-of", name]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | FRUGAL).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--layers", type=int, default=24, help="encoder layers; 24 is CLIP ViT-L")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        print(peak_bytes(variant(args.memory_of, args), args.device))
        return

    runs = {name: variant(name, args) for name in VARIANTS}
    for run in runs.values():
        run()
    times = {name: [] for name in VARIANTS}
    for _ in range(args.repeats):
        for name, run in runs.items():
            times[name].append(run())
    memory = {name: memory_in_a_fresh_process(name, sys.argv[1:]) for name in VARIANTS}
    rows = [row(name, times, memory, args) for name in VARIANTS]
    write(rows, args)


def row(name: str, times: dict, memory: dict, args: argparse.Namespace) -> dict[str, object]:
    """Return a row of the table. Ratios are medians of the ratios to `plain` within each round."""
    ratios = [own["seconds"] / plain["seconds"] for own, plain in zip(times[name], times["plain"], strict=True)]
    selection = [own["selection"] / plain["seconds"] for own, plain in zip(times[name], times["plain"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "variant": name,
        "time_ratio": f"{statistics.median(ratios):.4f}",
        "time_ratio_q1": f"{quartiles[0]:.4f}",
        "time_ratio_q3": f"{quartiles[2]:.4f}",
        "selection_over_encoder": f"{statistics.median(selection):.5f}",
        "memory_ratio": f"{memory[name] / memory['plain']:.3f}",
        "median_ms": f"{1000 * statistics.median(t['seconds'] for t in times[name]):.1f}",
        "peak_mib": f"{memory[name] / 2**20:.1f}",
        "batch": args.batch,
        "layers": args.layers,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "method": str(METHOD.to_dict()),
        "commit": commit(),
    }


def write(rows: list[dict[str, object]], args: argparse.Namespace) -> None:
    path = args.out / file_name("selection-cost", args.device, args.dtype, f"batch{args.batch}")
    write_csv(path, rows)
    for line in rows:
        print(
            f"{line['variant']:<10} time {line['time_ratio']}x  selection {line['selection_over_encoder']} of it"
            f"  peak memory {line['memory_ratio']}x ({line['peak_mib']} MiB)"
        )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
