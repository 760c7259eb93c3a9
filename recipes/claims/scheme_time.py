"""The time of training mini with LLaVolta's schemes: `python -m recipes.claims.scheme_time --out runs/claims`.

All seven schemes are trained as in training_claims.py, in turns, for fewer steps over the same records. `seconds` is
the wall-clock time from the first step to the end, as `Trainer` reports it, without start, loading and saving. `time`
is its ratio to that of `none` in the same round: median, least and greatest. `limit` is the ratio that the FLOPs of a
step alone would give (encoder, projector, LLM and output head; forward and backward). Run it on a quiet machine; each
process uses one thread.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch

from recipes.benchmarks import RESULTS
from recipes.benchmarks.train_step import step_flops
from recipes.claims.training_claims import BATCH, LAST, SCHEMES, SEEDS, WARM, prepare, train_model
from vlmzip import NoCompression, attach
from vlmzip.compressor import Compressor
from vlmzip.files import write_csv
from vlmzip.json_text import parse, read_lines
from vlmzip.lab.bench.timing import in_turns
from vlmzip.lab.machine import about
from vlmzip.runtime.loading import load
from vlmzip.runtime.prompt import pad_id
from vlmzip.training.batches import Collator, Preprocessor
from vlmzip.training.records import Records
from vlmzip.training.schedule import scheme
from vlmzip.training.trainer import LOG, SUMMARY

#: A multiple of two, three and four, so that all stages of a scheme have the same length.
STEPS = 48
NAMES = ("none", *SCHEMES, LAST)


def seconds(name: str, out: Path, processes: int) -> float:
    """Train once, delete the model, and return the seconds."""
    with tempfile.TemporaryDirectory() as empty:
        folder = Path(empty) / "run"
        settings = [f"schedule={name}", f"steps={STEPS}", f"seed={SEEDS[0]}", 'trainer.save_strategy="no"']
        train_model(out, folder, out / WARM, settings, processes)
        lines = [parse(line.text) for line in read_lines(folder / LOG)]
    return next(line[SUMMARY] for line in lines if SUMMARY in line)


def flops(out: Path) -> dict[str, float]:
    """Return the FLOPs of a step with each scheme, as the mean over its stages, on one batch."""
    loaded = load(str(out / WARM / "model"), "cpu", "float32")
    path = out / "data" / "records.json"
    records, conversations = Records(path), Preprocessor(loaded.processor, loaded.family, 500)
    rows = [conversations(records[number], path.parent) for number in range(BATCH)]
    batch = Collator(pad_id(loaded.family), conversations.blank())(rows)
    compressed = attach(loaded.model, NoCompression())

    def flops_with(compressor: Compressor) -> int:
        compressed.switch(compressor)
        with torch.no_grad():
            return step_flops(compressed, batch)

    layers = loaded.family.profile().layers
    return {name: mean(flops_with(stage.compressor) for stage in scheme(name, layers).stages) for name in NAMES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    results = RESULTS / "scheme-time.csv"
    parser.add_argument("--results", type=Path, default=results, metavar="CSV")
    args = parser.parse_args()
    prepare(args.out, args.processes)
    step = flops(args.out)
    runs = {name: partial(seconds, name, args.out, args.processes) for name in NAMES}
    runs["none"]()  # reads the images into the disk cache, as a warm-up
    taken = in_turns(runs, args.repeats, warmup=0)
    rows = []
    for name in NAMES:
        shares = [mine / plain for mine, plain in zip(taken[name], taken["none"], strict=True)]
        rows.append({"scheme": name, "seconds": f"{median(taken[name]):.1f}", "time": f"{median(shares):.3f}"})
        rows[-1] |= {"low": f"{min(shares):.3f}", "high": f"{max(shares):.3f}"}
        rows[-1] |= {"limit": f"{step[name] / step['none']:.3f}", "steps": STEPS, "repeats": args.repeats}
        rows[-1] |= {"processes": args.processes, **about()}
        print(*list(rows[-1].values())[:6])
    write_csv(args.results, rows)


if __name__ == "__main__":
    main()
