"""Measure vLLM with and without the plugin: requests per second, time to first token, and peak use of the KV cache.

    make test-vllm                                          # installs vLLM for the CPU in .venv-vllm
    .venv-vllm/bin/python -m recipes.serving.vllm_speed     # about 10 minutes on one idle core
    .venv-vllm/bin/python -m recipes.serving.vllm_speed --concurrency 1,4 --requests 4 --rounds 1    # a short trial
    .venv-vllm/bin/python -m recipes.serving.vllm_speed --method "pool2d(factor=3)" "dfmr(tau=99)"   # equal counts

The model has LLaVA-1.5's 576 visual tokens, random weights, a small encoder, and an LLM that is wide and deep enough
that its prefill dominates. An engine for each method, and one without the plugin, run in this process and take turns:
the same requests at each concurrency, each with another image, so that no cache helps. As soon as a request ends, the
next one starts. On a machine with other work, `--clock cpu` counts the seconds of this process.

The limit is the ratio of the FLOPs of both, encoder, projector and the products of attention included; see
`vlmzip.runtime.flops`. It does not count the selection, the processor and the scheduler. It takes each FLOP to cost the
same time; on a CPU, those of a large batch can cost more.

The time of a request is also split into parts: the pixels of the image, the encoder, the compression, the projector,
the LLM, and the rest.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

# vLLM reads these when it is imported.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
} | {name: os.environ.get(name, value) for name, value in {"VLLM_CPU_KVCACHE_SPACE": "1"}.items()}

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.llava import modeling_llava
from vllm import LLM, SamplingParams, __version__
from vllm.model_executor.models import clip, llava
from vllm.multimodal.processing import BaseMultiModalProcessor

from recipes.benchmarks import RESULTS
from vlmzip import mini
from vlmzip.files import write_csv
from vlmzip.lab.machine import about, file_name
from vlmzip.models import family_of
from vlmzip.runtime import stages
from vlmzip.runtime.flops import flops_inside, prefill_flops
from vlmzip.serving.vllm.checkpoint import write_checkpoint

PROMPT = "USER: <image>\nwhat color is the ring left of the star ? ASSISTANT:"
SIDE, PATCH = 336, 14
VISUAL = (SIDE // PATCH) ** 2
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
#: The parts of a request, and the functions of vLLM, transformers and vlmzip that do their work.
PARTS: dict[str, tuple[tuple[Any, str], ...]] = {
    "pixels": ((BaseMultiModalProcessor, "_apply_hf_processor_main"),),
    "encoder": ((clip.CLIPVisionModel, "forward"), (CLIPVisionModel, "forward")),
    "compression": ((stages, "compress"),),
    "projector": (
        (llava.LlavaMultiModalProjector, "forward"),
        (modeling_llava.LlavaMultiModalProjector, "forward"),
    ),
    "llm": ((llava.LlavaForConditionalGeneration, "forward"),),
}
#: The row of vLLM without the plugin's compression.
STOCK = "stock"


def build(args: argparse.Namespace) -> LlavaForConditionalGeneration:
    """Make a LLaVA with random weights and 576 visual tokens."""
    vision = CLIPVisionConfig(
        hidden_size=args.vision_width, intermediate_size=4 * args.vision_width, num_hidden_layers=args.vision_layers,
        num_attention_heads=args.vision_width // 64, image_size=SIDE, patch_size=PATCH, projection_dim=64,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=args.width, intermediate_size=args.mlp, num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64, num_key_value_heads=args.width // 64, vocab_size=98, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, image_seq_length=VISUAL)
    return LlavaForConditionalGeneration(config).to(getattr(torch, args.dtype)).eval()


def processor() -> LlavaProcessor:
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
        AutoTokenizer.from_pretrained(mini.weights_folder()),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def flops(model: LlavaForConditionalGeneration, visual: int, text: int) -> int:
    """Return the FLOPs of a request: encoder, projector and the prefill of the LLM, with so many tokens."""
    family = family_of(model)
    pixels = torch.zeros(1, 3, SIDE, SIDE, dtype=model.dtype)
    features = torch.zeros(visual, model.config.vision_config.hidden_size, dtype=model.dtype)
    tower, projector = family.vision_encoder, family.projector
    with torch.inference_mode():
        encoder = flops_inside([tower], lambda: tower(pixels))
        encoder = encoder * (model.config.vision_config.num_hidden_layers - 1) // len(family.tower.attentions)
        return encoder + flops_inside([projector], lambda: projector(features)) + prefill_flops(family, visual + text)


@dataclass
class Run:
    """What was measured in one run of the requests through one engine."""

    seconds: float = 0.0
    ttft: list[float] = field(default_factory=list)
    peak: float = 0.0
    """The largest share of the KV cache in use."""
    prompt: int = 0
    parts: Counter[str] = field(default_factory=Counter)
    """The seconds of each part of all requests."""

    def milliseconds(self, part: str) -> float:
        """Return the time of a part of a request, or of the rest."""
        seconds = self.seconds - self.parts.total() if part == "rest" else self.parts[part]
        return 1000 * seconds / len(self.ttft)


def requests(count: int, seed: int) -> Iterator[dict[str, object]]:
    """Yield requests with different images."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        image = Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))
        yield {"prompt": PROMPT, "multi_modal_data": {"image": image}}


@contextmanager
def seeing_peak(scheduler: Any, result: Run) -> Iterator[None]:
    """Note the use of the KV cache when a step is scheduled; requests that end in the step free it at once."""
    schedule = scheduler.schedule

    def seen(*args: object, **kwargs: object) -> object:
        scheduled = schedule(*args, **kwargs)
        result.peak = max(result.peak, scheduler.kv_cache_manager.usage)
        return scheduled

    scheduler.schedule = seen
    try:
        yield
    finally:
        scheduler.schedule = schedule


@contextmanager
def timing_parts(now: Callable[[], float], result: Run) -> Iterator[None]:
    """Add up the time of each part."""

    def timed(function: Callable[..., object], part: str) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            start = now()
            try:
                return function(*args, **kwargs)
            finally:  # a run of the encoder may end before its last layers
                result.parts[part] += now() - start

        return call

    with ExitStack() as stack:
        for part, functions in PARTS.items():
            for owner, name in functions:
                stack.enter_context(patch.object(owner, name, timed(getattr(owner, name), part)))
        yield


def run(engine: LLM, asked: Sequence[dict[str, object]], concurrency: int, args: argparse.Namespace) -> Run:
    """Send the requests, so many at a time, and measure."""
    inner, result, now = engine.llm_engine, Run(), CLOCKS[args.clock]
    params = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True)
    waiting, sent, started = list(asked), {}, now()
    number = 0
    with timing_parts(now, result):
        while waiting or inner.has_unfinished_requests():
            while waiting and len(sent) < concurrency:
                name = f"{id(result)}-{number}"
                sent[name] = now()
                inner.add_request(name, waiting.pop(0), params)
                number += 1
            with seeing_peak(inner.engine_core.engine_core.scheduler, result):
                outputs = inner.step()
            for output in outputs:
                start = sent[output.request_id]
                if start is not None and output.outputs[0].token_ids:
                    result.ttft.append(now() - start)
                    sent[output.request_id] = None
                if output.finished:
                    result.prompt = len(output.prompt_token_ids)
                    del sent[output.request_id]
    result.seconds = now() - started
    return result


def engines(folder: Path, args: argparse.Namespace) -> dict[str, LLM]:
    """Start vLLM on the checkpoint, without compression and with each method."""
    usual = {
        "dtype": args.dtype,
        "max_model_len": 1024,
        "max_num_seqs": 32,
        "max_num_batched_tokens": args.batched_tokens,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "limit_mm_per_prompt": {"image": 1},
        "seed": 0,
    }
    overrides = {STOCK: {}, **{method: {"vlmzip": method} for method in args.method}}
    return {name: LLM(str(folder), **usual, hf_overrides=of_engine) for name, of_engine in overrides.items()}


def row(name: str, concurrency: int, runs: dict[str, list[Run]], engine: LLM, limit: float, args: argparse.Namespace):
    """Return a row of the table. Ratios are medians of the ratios to stock vLLM within each round."""
    speedup = statistics.median(
        stock.seconds / measured.seconds for stock, measured in zip(runs[STOCK], runs[name], strict=True)
    )
    measured, config = runs[name], engine.llm_engine.vllm_config.cache_config
    ttft = sorted(value for each in measured for value in each.ttft)
    stock_ttft = statistics.median(value for each in runs[STOCK] for value in each.ttft)
    return {
        "method": name,
        "concurrency": concurrency,
        "prompt_tokens": measured[0].prompt,
        "requests_per_second": f"{statistics.median(len(each.ttft) / each.seconds for each in measured):.3f}",
        "ratio": f"{speedup:.3f}",
        "flops_limit": f"{limit:.3f}",
        "share_of_limit": f"{speedup / limit:.3f}",
        "ttft_median_ms": f"{1000 * statistics.median(ttft):.1f}",
        "ttft_p95_ms": f"{1000 * ttft[int(0.95 * (len(ttft) - 1))]:.1f}",
        "ttft_ratio": f"{stock_ttft / statistics.median(ttft):.3f}",
        # vLLM keeps one block of the cache empty, and does not count it in the share.
        "peak_kv_tokens": round(max(each.peak for each in measured) * (config.num_gpu_blocks - 1)) * config.block_size,
        **{f"{part}_ms": f"{statistics.median(each.milliseconds(part) for each in measured):.1f}" for part in PARTS},
        "rest_ms": f"{statistics.median(each.milliseconds('rest') for each in measured):.1f}",
        "requests": len(measured[0].ttft),
        "rounds": args.rounds,
        "new_tokens": args.new_tokens,
        "width": args.width,
        "layers": args.layers,
        "vision_width": args.vision_width,
        "vision_layers": args.vision_layers,
        "batched_tokens": args.batched_tokens,
        "dtype": args.dtype,
        "clock": args.clock,
        "vllm": __version__,
        **about(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", default=["visionzip(keep=64)"])
    parser.add_argument("--concurrency", default="1,4,16,32")
    parser.add_argument("--requests", type=int, help="per run; default: twice the concurrency, at least 8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=1)
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--mlp", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vision-width", type=int, default=256)
    parser.add_argument("--vision-layers", type=int, default=4)
    parser.add_argument("--batched-tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    # Methods that count by content load their encoder from the folder with the first image.
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), args)


def measure(folder: Path, args: argparse.Namespace) -> None:
    """Measure all engines in turns, and write the CSV."""
    model = build(args)
    write_checkpoint(model, processor(), folder)
    variants = engines(folder, args)
    prompts = {name: run(engine, list(requests(1, 0)), 1, args).prompt for name, engine in variants.items()}
    text = prompts[STOCK] - VISUAL
    kept = {name: length - text for name, length in prompts.items()}
    limits = {name: flops(model, VISUAL, text) / flops(model, count, text) for name, count in kept.items()}
    rows = []
    for concurrency in map(int, args.concurrency.split(",")):
        count, runs = args.requests or max(8, 2 * concurrency), {name: [] for name in variants}
        for number in range(args.rounds):
            asked = list(requests(count, 1000 * concurrency + number))
            for name, engine in variants.items():
                runs[name].append(run(engine, asked, concurrency, args))
        for name, engine in variants.items():
            rows.append(row(name, concurrency, runs, engine, limits[name], args))
            print(", ".join(f"{key} {value}" for key, value in list(rows[-1].items())[:17]), flush=True)
    path = args.out / file_name(
        "vllm-speed", "cpu", f"vllm{__version__}", args.dtype, f"{args.new_tokens}-new", f"{args.clock}-seconds"
    )
    write_csv(path, rows)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
