"""Measure the time of a training step in each stage of LLaVolta's schemes, and compare it with the FLOPs.

    OMP_NUM_THREADS=1 python -m recipes.benchmarks.train_step --clock cpu     # LLaVA-1.5-7B with heads and MLPs at 1/8

A step is forward, loss and backward, without the optimiser, which compression does not change. Projector and LLM learn;
the vision encoder is frozen. FLOPs count the encoder's forward once, and the forward of projector and LLM three times;
the output head sees every token. *share of the saving* is the saved time as a share of the saving that the FLOPs give.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from torch import nn

from recipes.benchmarks import RESULTS
from vlmzip import LLaVolta, NoCompression, attach
from vlmzip.files import write_csv
from vlmzip.lab.bench.presets import PRESETS, make_model
from vlmzip.lab.bench.timing import cpu_seconds, in_turns, now, quartiles, ratios
from vlmzip.lab.machine import about
from vlmzip.methods import Pool2d, VisionZip
from vlmzip.models import family_of
from vlmzip.runtime.flops import flops_inside
from vlmzip.runtime.token_profile import TokenProfile

#: The stages of Table 1, and two methods before the LLM.
STAGES = {
    "none": NoCompression(),
    **{f"layer {k}, stride {s}": LLaVolta(layer=k, stride=s) for k, s in ((2, 8), (2, 2), (2, 16), (16, 8), (16, 2))},
    **{f"layer {k}, stride {s}": LLaVolta(layer=k, stride=s) for k, s in ((16, 16), (16, 4))},
    "pool2d(factor=3)": Pool2d(factor=3),
    "visionzip(keep=64)": VisionZip(keep=64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1 / 8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--text-tokens", type=int, default=62)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: where others use the cores too")
    parser.add_argument("--device", default="cpu")
    results = RESULTS / "train-step.csv"
    parser.add_argument("--results", type=Path, default=results, metavar="CSV")
    args = parser.parse_args()

    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    preset = PRESETS["llava-1.5-7b"].scaled(args.scale)
    model = make_model(preset.config(), args.device, dtype).train()
    model.model.vision_tower.requires_grad_(False)
    family = family_of(model)
    inputs = preset.inputs(args.batch, args.text_tokens, args.device, dtype)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == family.placeholder_id, -100)
    compressed = attach(model, NoCompression())
    clock = {"wall": now, "cpu": cpu_seconds}[args.clock]

    def step(name: str) -> float:
        compressed.switch(STAGES[name])
        start = clock(args.device)
        compressed(**inputs, labels=labels).loss.backward()
        spent = clock(args.device) - start
        model.zero_grad()
        return spent

    flops = {}
    for name, compressor in STAGES.items():
        compressed.switch(compressor)
        flops[name] = step_flops(compressed, inputs)
    seconds = in_turns({name: partial(step, name) for name in STAGES}, args.repeats)
    rows = []
    for name in STAGES:
        speed, limit = ratios(seconds[name], seconds["none"]), flops["none"] / flops[name]
        share = (1 - 1 / speed.median) / (1 - 1 / limit) if limit > 1 else float("nan")
        rows.append(
            {
                "stage": name,
                "ms": f"{1000 * quartiles(seconds[name]).median:.0f}",
                "speed-up": f"{speed.median:.3f}",
                "first quartile": f"{speed.first:.3f}",
                "third quartile": f"{speed.third:.3f}",
                "limit": f"{limit:.3f}",
                "share of the saving": "" if limit == 1 else f"{share:.3f}",
                "scale": args.scale,
                "batch": args.batch,
                "clock": args.clock,
                **about(args.device),
            }
        )
        print(" ".join(f"{value:>12}" for value in list(rows[-1].values())[:7]))
    write_csv(args.results, rows)


def step_flops(compressed: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Return the FLOPs of forward and backward of a step, without selection and pooling."""
    family = family_of(compressed.inner)
    with torch.no_grad():
        encoder = flops_inside([family.vision_encoder], lambda: compressed(**inputs))
        projector = flops_inside([family.projector], lambda: compressed(**inputs))
    llm = 0
    head = 2 * family.llm_config.hidden_size * family.llm_config.vocab_size
    for profile in TokenProfile.rows(compressed.report, inputs["attention_mask"].sum(1).tolist()):
        llm += profile.prefill_flops(family) + head * (profile.all[-1] - 1)
    return encoder + 3 * (projector + llm)


if __name__ == "__main__":
    main()
