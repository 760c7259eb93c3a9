"""Measure why a method's prefill is slower than its FLOPs limit, against text-only prompts, in CPU seconds.

    OMP_NUM_THREADS=1 python -m recipes.benchmarks.rest_of_the_limit  # LLaVA-1.5-7B with heads and MLPs at 1/8

A text-only prompt needs no compressor and no images. Layers that see n tokens cannot be faster than those of a text
with n tokens. The time of a method beyond the sum of such layers is the method's own work, which includes the report's
"selection".
"""

import argparse
from collections import defaultdict
from functools import partial
from statistics import median
from unittest import mock

import torch

from vlmzip import attach, spec
from vlmzip.keep import A_NINTH
from vlmzip.lab.bench.presets import PRESETS, make_model
from vlmzip.lab.bench.timing import cpu_seconds, in_turns, time_answer
from vlmzip.lab.machine import about
from vlmzip.models import family_of
from vlmzip.runtime.flops import prefill_flops

METHODS = "visionzip,pool2d,llavolta,fastv"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    preset = PRESETS["llava-1.5-7b"].scaled(1 / 8)
    model = make_model(preset.config(), "cpu", torch.float32)
    family, inputs = family_of(model), preset.inputs(1, args.text_tokens, "cpu", torch.float32)
    profile = family.profile()
    methods = {name: method.at_budget(A_NINTH, profile)[0] for name, method in spec.read_several(args.methods)}
    by_layer = {n: [count + args.text_tokens for count in m.tokens_by_layer(profile)] for n, m in methods.items()}
    lengths = {preset.visual_tokens + args.text_tokens, *(count for counts in by_layer.values() for count in counts)}
    selection = defaultdict(list)

    def of_text(length: int) -> float:
        ids = torch.randint(3, 32_000, (1, length))
        return time_answer(model, family, {"input_ids": ids}, 2, cpu_seconds).prefill

    def of_method(name: str) -> float:
        with attach(model, methods[name]) as compressed:
            spans = time_answer(compressed, family, inputs, 2, cpu_seconds)
            selection[name].append(compressed.report.milliseconds["selection"])
        return spans.prefill

    runs = {f"text {n}": partial(of_text, n) for n in sorted(lengths)} | {n: partial(of_method, n) for n in methods}
    with mock.patch("time.perf_counter", cpu_seconds):  # the report's stopwatch too
        found = {name: 1000 * median(seconds) for name, seconds in in_turns(runs, args.repeats).items()}

    print("| prefill of | ms | GFLOP/s |\n| --- | --- | --- |")
    for n in sorted(lengths):
        spent = found[f"text {n}"]
        print(f"| text, {n} tokens | {spent:.1f} | {prefill_flops(family, n) / spent / 1e6:.1f} |")
    print("\n| method | ms | layers as in text alone | the rest | selection |\n| --- | --- | --- | --- | --- |")
    for name, counts in by_layer.items():
        layers = sum(found[f"text {count}"] for count in counts) / len(counts)
        rest, selecting = found[name] - layers, median(selection[name])
        print(
            f"| {name} | {found[name]:.1f} | {layers:.1f} | {rest:.1f} ({rest / found[name]:.1%}) | {selecting:.1f} |"
        )
    print("\nSelection before the LLM is no part of the prefill.", about("cpu"))


if __name__ == "__main__":
    main()
