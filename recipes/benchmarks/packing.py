"""Measure what packing rows side by side saves in training, compared with padding: padding and forward/backward time.

    python -m recipes.mini.conversations --images 600 --out runs/guide/data
    OMP_NUM_THREADS=1 python -m recipes.benchmarks.packing --records runs/guide/data/records.json --clock cpu

mini is trained on its training records in batches of `--batch`, with bfloat16 autocast; projector and LLM learn.
"""

import argparse
from functools import partial
from itertools import product
from pathlib import Path

import torch

from recipes.benchmarks import RESULTS
from vlmzip import attach, spec
from vlmzip.files import write_csv
from vlmzip.lab.bench.timing import cpu_seconds, in_turns, now, quartiles, ratios
from vlmzip.lab.machine import about
from vlmzip.runtime.loading import load
from vlmzip.runtime.prompt import pad_id
from vlmzip.training.batches import Collator, Preprocessor
from vlmzip.training.random_factor import RandomFactor
from vlmzip.training.records import Records

#: Methods with varying token counts keep 45 % on average, as in configs/mini-dfmr.yaml.
COMPRESSORS = {
    "dfmr(tau=0.3206)": spec.read("dfmr(tau=0.3206)"),
    "random_factor": RandomFactor(),
    "no_compression": spec.read("no_compression"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--forwards", type=int, default=4, help="different batches in a round")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: where others use the cores too")
    results = RESULTS / "packing.csv"
    parser.add_argument("--results", type=Path, default=results, metavar="CSV")
    args = parser.parse_args()

    loaded, clock = load("mini", "cpu", "float32"), {"wall": now, "cpu": cpu_seconds}[args.clock]
    loaded.model.set_attn_implementation("eager")
    loaded.family.vision_encoder.requires_grad_(False)
    records = Records(args.records)
    conversations = Preprocessor(loaded.processor, loaded.family, 500)
    rows = [conversations(records[n], args.records.parent) for n in range(args.batch * args.forwards)]
    together = Collator(pad_id(loaded.family), conversations.blank())
    batches = [together(rows[start : start + args.batch]) for start in range(0, len(rows), args.batch)]
    compressed = attach(loaded.model, COMPRESSORS["no_compression"]).train()

    def run(name: str, packed: bool) -> tuple[float, float]:
        """Return the seconds, and the share of padding in the LLM's input."""
        compressed.switch(COMPRESSORS[name])
        padding = of = 0
        start = clock("cpu")
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16):
                loss = compressed(**batch, pack_rows=packed).loss
            loss.backward()
            source = compressed.report.source
            padding, of = padding + int((source < 0).sum()), of + source.numel()
        spent = clock("cpu") - start
        compressed.zero_grad()
        return spent, padding / of

    ways = {f"{name}, {packed}": partial(run, name, packed) for name, packed in product(COMPRESSORS, (False, True))}
    found = in_turns(ways, args.repeats)
    lines = []
    for name in COMPRESSORS:
        seconds = {packed: [one[0] for one in found[f"{name}, {packed}"]] for packed in (False, True)}
        ratio = ratios(seconds[True], seconds[False])
        shares = {packed: found[f"{name}, {packed}"][0][1] for packed in (False, True)}
        lines.append(
            {
                "compressor": name,
                "padding, padded": f"{shares[False]:.3f}",
                "padding, packed": f"{shares[True]:.3f}",
                "ms, padded": f"{1000 * quartiles(seconds[False]).median / len(batches):.0f}",
                "speed-up": f"{ratio.median:.3f}",
                "first quartile": f"{ratio.first:.3f}",
                "third quartile": f"{ratio.third:.3f}",
                "batch": args.batch,
                "clock": args.clock,
                **about("cpu"),
            }
        )
        print(" ".join(f"{value:>12}" for value in list(lines[-1].values())[:7]))
    write_csv(args.results, lines)


if __name__ == "__main__":
    main()
