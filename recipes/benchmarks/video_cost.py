"""Measure what selections cost on videos: time and peak memory of Qwen's vision encoders with and without them.

    OMP_NUM_THREADS=1 python -m recipes.benchmarks.video_cost

Qwen2.5-VL and Qwen3-VL have tiny dimensions and random weights here. Their videos have 8 to 64 frames; two frames make
8 x 8 visual tokens. The plain encoder and every selection are interleaved in one run, so that noise affects them
equally. On a CPU, time is the CPU time of the process, because other processes may use the same cores. Memory is
measured in a fresh process for each model.

It writes one row for each model, number of frames and selection to benchmarks/results/, with hardware and versions in
the file name.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from recipes.benchmarks import RESULTS
from vlmzip import spec
from vlmzip.compressor import Compressor
from vlmzip.files import write_csv
from vlmzip.lab.bench.memory import in_frugal_process, peak_bytes
from vlmzip.lab.bench.timing import cpu_seconds, in_turns, now
from vlmzip.lab.machine import about, file_name
from vlmzip.models import family_of
from vlmzip.runtime.compress import compress

PLAIN = "plain"
METHODS = (
    "random_tokens(keep_per_view=16)",
    "pool2d(factor=2)",
    "dfmr",
    "visionzip(keep_per_view=16)",
    "kmeans(keep_per_view=16)",
    "evs(keep=25%)",
)
PATCH, MERGE, JOINED = 14, 2, 2
#: Rows and columns of the visual tokens of a frame of the grid, which joins two frames of the video.
SIDE = 8
LLM = dict(
    hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=32, bos_token_id=1, eos_token_id=2,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
)  # fmt: skip
VISION = dict(
    depth=4, hidden_size=128, intermediate_size=256, num_heads=4, patch_size=PATCH, spatial_merge_size=MERGE,
    temporal_patch_size=JOINED, out_hidden_size=128,
)  # fmt: skip
TOKENS = dict(image_token_id=31, video_token_id=30, vision_start_token_id=29, vision_end_token_id=28)


def qwen2_5_vl() -> PreTrainedModel:
    vision = dict(**VISION, window_size=4 * MERGE * PATCH, fullatt_block_indexes=[3])
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=LLM, **TOKENS))


def qwen3_vl() -> PreTrainedModel:
    vision = dict(**VISION, num_position_embeddings=(SIDE * MERGE) ** 2, deepstack_visual_indexes=[1])
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(vision_config=vision, text_config=LLM | {"head_dim": 32}, **TOKENS)
    )


MODELS = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}
Settings = argparse.Namespace


def build(name: str, args: Settings) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = MODELS[name]().eval()
    return model.to(args.device, getattr(torch, args.dtype))


def variant(model: PreTrainedModel, frames: int, method: str, args: Settings) -> Callable[[], dict[str, float]]:
    """Return a function that encodes a video once, with a selection or plainly, and returns seconds and tokens."""
    steps, side = frames // JOINED, SIDE * MERGE
    rng = torch.Generator().manual_seed(frames)
    pixels = torch.randn(steps * side**2, 3 * JOINED * PATCH**2, generator=rng)
    inputs = {
        "pixel_values_videos": pixels.to(model.device, model.dtype),
        "video_grid_thw": torch.tensor([[steps, side, side]], device=model.device),
    }
    family = family_of(model).modalities[1]
    clock = now if args.device.startswith("cuda") else cpu_seconds
    compressor: Compressor | None = None if method == PLAIN else spec.read(method)

    def run() -> dict[str, float]:
        start = clock(args.device)
        if compressor is None:
            model.get_video_features(**inputs)
            return {"seconds": clock(args.device) - start, "selection": 0.0, "tokens": steps * SIDE**2}
        encoded = family.encode(inputs, compressor.site, compressor.needs)
        middle = clock(args.device)
        (kept,) = compress(family.layouts(inputs), encoded, compressor)
        end = clock(args.device)
        return {"seconds": end - start, "selection": end - middle, "tokens": len(kept.features)}

    return torch.inference_mode()(run)


def memory_of(name: str, args: Settings) -> Iterator[tuple[tuple[int, str], int]]:
    """Yield the peak memory of every variant of a model, for each number of frames."""
    model = build(name, args)
    for frames in args.frames:
        for method in (PLAIN, *METHODS):
            yield (frames, method), peak_bytes(variant(model, frames, method, args), args.device)


def rows_of(name: str, args: Settings) -> list[dict[str, object]]:
    """Measure one model, and return the rows of its table."""
    memory = dict(in_frugal_process(memory_of, name, args))
    model, rows = build(name, args), []
    for frames in args.frames:
        runs = {method: variant(model, frames, method, args) for method in (PLAIN, *METHODS)}
        measured = in_turns(runs, args.repeats)
        for method, of_method in measured.items():
            rows.append(
                {"model": name, "frames": frames, "method": method}
                | row(of_method, measured[PLAIN], memory[frames, method], memory[frames, PLAIN])
                | {"dtype": args.dtype, "repeats": args.repeats}
                | about(args.device)
            )
            print(*list(rows[-1].values())[:10], sep="  ", flush=True)
    return rows


def row(
    runs: Sequence[dict[str, float]], plain: Sequence[dict[str, float]], peak: int, plain_peak: int
) -> dict[str, object]:
    """Return the measurements of a variant. Ratios are medians of the ratios to the plain encoder within each round."""
    pairs = list(zip(runs, plain, strict=True))
    ratios = [run["seconds"] / alone["seconds"] for run, alone in pairs]
    quartiles = statistics.quantiles(ratios, n=4)
    selection = statistics.median(run["selection"] / alone["seconds"] for run, alone in pairs)
    return {
        "tokens_before": int(plain[0]["tokens"]),
        "tokens_after": int(runs[0]["tokens"]),
        "time_ratio": f"{statistics.median(ratios):.4f}",
        "time_ratio_q1": f"{quartiles[0]:.4f}",
        "time_ratio_q3": f"{quartiles[2]:.4f}",
        "selection_over_encoder": f"{selection:.5f}",
        "memory_ratio": f"{peak / plain_peak:.3f}",
        "median_ms": f"{1000 * statistics.median(run['seconds'] for run in runs):.1f}",
        "peak_mib": f"{peak / 2**20:.1f}",
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 16, 32, 64], help="even numbers")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    rows = [line for name in MODELS for line in rows_of(name, args)]
    path = args.out / file_name("video-cost", args.device, args.dtype)
    write_csv(path, rows)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
