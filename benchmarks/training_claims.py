"""The papers' claims on training, tried in miniature on mini: `python benchmarks/training_claims.py --out runs/claims`.

Every run starts from the same mini (its encoder, and an LLM that has seen captions alone), sees the same pictures, and
takes the same number of steps. Stopped at any point, the same command goes on where it was: runs that are complete are
not trained again, answers that were given are not asked for again. `--only NAME` runs one; `--table` only writes the
results so far. The runs stand in the order in which they tell most; `python docs/training_claims.py` makes their page.
"""

import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEPS, BATCH, QUESTIONS = 240, 16, 1024
SCHEMES = (
    "two-stage",
    "three-stage-deeper",
    "three-stage-wider",
    "four-stage-wider-then-deeper",
    "four-stage-deeper-then-wider",
)
LAST = "last-stage-compression"
#: LLaVolta's (2, 8) and (16, 4) of 32 layers in an LLM of eight; of 144 tokens 18 and 36 are left.
HEAVY, LIGHT = "llavolta(layer=1,stride=8)", "llavolta(layer=4,stride=4)"
#: The other compressors of the paper's Table 3, at the same layer and count.
OTHERS = {
    "random": "random_tokens(site=in_llm,layer=1,keep=18)",
    "kmeans": "kmeans(site=in_llm,layer=1,keep=18)",
    "fastv": "fastv(layer=1,keep=18)",
}
FACTORS = ("pool2d(factor=2)", "pool2d(factor=3)")
#: 33, 22 and 11 % of 144 tokens, the paper's 192, 128 and 64 of 576.
ZIPS = tuple(f"visionzip(keep={keep})" for keep in (48, 32, 16))
#: The mean of DFMR's tokens is to be Random's: (144 + 36 + 16) / 3 of 144. Set by `vlmzip calibrate` on 180 pictures.
DFMR = "dfmr(tau={tau})"
SHARE = (144 + 36 + 16) / 3 / 144


@dataclass(frozen=True)
class Training:
    """A model to train, and what it answers with."""

    name: str
    schedule: str
    answers_with: tuple[str, ...]
    """Beside the model without compression."""
    seed: int = 0
    settings: tuple[str, ...] = ()
    base: str = ""
    """The training that it goes on from; else the common base."""


def trainings(tau: str) -> list[Training]:
    """All runs, in the order in which they tell most."""
    dfmr = DFMR.format(tau=tau)
    none_with = (HEAVY, LIGHT, *OTHERS.values(), *FACTORS, dfmr, *ZIPS)
    varied = (dfmr, *FACTORS)

    def thrice(seed: int) -> list[Training]:
        """What is trained with three seeds."""
        mark = f"-seed{seed}" if seed else ""
        return [
            Training(f"none{mark}", "none", (LIGHT, *FACTORS, dfmr, *ZIPS) if seed else none_with, seed),
            Training(f"{LAST}{mark}", LAST, (LIGHT,), seed),
            Training(f"dfmr{mark}", dfmr, varied, seed),
            Training(f"random-factor{mark}", "random_factor", varied, seed),
            *[_tuned(zipped, seed, mark) for zipped in ZIPS],
        ]

    runs = thrice(0)
    runs += [Training("heavy", HEAVY, (HEAVY,)), Training("pool2d-2", FACTORS[0], (FACTORS[0],))]
    runs += [Training(name, name, ()) for name in SCHEMES]
    runs += [Training(f"{name}-in-llm", written, (written,)) for name, written in OTHERS.items()]
    runs += [Training(f"{zipped}-from-scratch", zipped, (zipped,)) for zipped in ZIPS]
    return [*runs, *thrice(1), *thrice(2)]


def _tuned(zipped: str, seed: int, mark: str) -> Training:
    """VisionZip's efficient tuning: the projector alone, a tenth of the data, on the model trained without it."""
    settings = ("learn=projector", "fraction=10%", f"steps={STEPS // 10}")
    return Training(f"{zipped}-tuned{mark}", zipped, (zipped,), seed, settings, base=f"none{mark}")


def train(one: Training, out: Path, processes: int) -> None:
    """Trains a model, unless it is there, and asks it its questions."""
    folder = out / one.name
    model = out / one.base / "model" if one.base else out / "data" / "base" / "model"
    # A list in YAML's form: brackets and commas of a compressor must not be read as something else.
    schedule = json.dumps(one.schedule)
    settings = [f"model={model}", f"records={out / 'data' / 'records.json'}", f"out={folder}", f"schedule={schedule}"]
    settings += [f"steps={STEPS}", f"batch={BATCH}", f"seed={one.seed}", *one.settings]
    if not (folder / "model" / "compressor.json").exists():
        config = Path(__file__).resolve().parents[1] / "configs" / "mini.yaml"
        changes = [word for setting in settings for word in ("--set", setting)]
        _start(["train", str(config), *changes], processes)
    methods = ",".join(one.answers_with) or "no_compression"
    wanted = ["--methods", methods, "--keep", "as-set", "--limit", str(QUESTIONS), "--batch", "64"]
    _start(["eval", "--model", str(folder / "model"), *wanted, "--out", str(folder / "eval")], processes)


def _start(command: list[str], processes: int) -> None:
    """A command of vlmzip in several processes of one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    print("vlmzip", *command, flush=True)
    subprocess.run([*launcher, "-m", "vlmzip.cli.main", *command], env=environment, check=True)


def prepare(out: Path, processes: int) -> str:
    """Pictures, the common base, and DFMR's threshold; returns it."""
    data = out / "data"
    if not (data / "records.json").exists():
        make = [sys.executable, "-m", "vlmzip.mini.conversations", "--out", str(data)]
        subprocess.run([*make, "--pictures", str(STEPS * BATCH)], check=True)
    if not (data / "base" / "model" / "config.json").exists():
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        make = [*launcher, "-m", "vlmzip.mini.conversations", "--base", "--out", str(data)]
        subprocess.run(make, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    calibrated = data / "dfmr.json"
    if not calibrated.exists():
        calibrated.write_text(json.dumps({"tau": _calibrate(data / "base" / "model")}))
    return json.loads(calibrated.read_text())["tau"]


def _calibrate(model: Path) -> str:
    """The threshold at which mini's validation pictures keep `SHARE` of their tokens on average."""
    from vlmzip import DFMR as Method
    from vlmzip.cli.loading import load
    from vlmzip.evaluation.mini_task import mini_task
    from vlmzip.runtime.calibration import measure, meet

    loaded = load(str(model))
    calibration = mini_task(1).calibration
    assert calibration is not None  # mini has one
    measured = measure(loaded.model, calibration.pictures(), Method(), processor=loaded.processor)
    return f"{meet(Method(), measured, SHARE).compressor.tau:.4g}"


def table(out: Path, path: Path, runs: list[Training]) -> None:
    """One line for each trained model and what it answered with, from what is there so far."""
    rows = []
    for one in runs:
        results = out / one.name / "eval" / "results.csv"
        if not results.exists():
            continue
        logged = [json.loads(line) for line in (out / one.name / "log.jsonl").open()]
        losses = [line["loss"] for line in logged if "loss" in line]
        padding = statistics.mean(line["padding"] for line in logged if "loss" in line)
        with results.open(encoding="utf-8", newline="") as file:
            for answered in csv.DictReader(file):
                names = ("score", "low", "high", "reached", "questions", "device", "torch", "transformers", "commit")
                trained = {
                    "training": one.name,
                    "schedule": one.schedule,
                    "seed": one.seed,
                    "steps": logged[-1]["step"],
                }
                trained |= {"cpu_seconds": round(cpu_seconds(logged), 1), "padding": round(padding, 4)}
                trained |= {"last_loss": round(losses[-1], 4), "answers_with": answered["method"]}
                rows.append(trained | {name: answered[name] for name in names})
    if not rows:
        sys.exit(f"nothing is trained in {out} yet")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} results in {path}")


def cpu_seconds(logged: list[dict[str, Any]]) -> float:
    """What the first process took between the first line of a log and the last; a resume starts its clock anew."""
    read = [line["cpu_seconds"] for line in logged]
    return sum(max(0.0, after - before) for before, after in itertools.pairwise(read))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--only", metavar="NAME", help="one of the runs")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="train nothing")
    results = Path(__file__).parent / "results" / "training-claims.csv"
    parser.add_argument("--results", type=Path, default=results, metavar="CSV")
    given = parser.parse_args()
    tau = prepare(given.out, given.processes)
    runs = trainings(tau)
    if given.only and given.only not in [one.name for one in runs]:
        parser.error(f"there is no run {given.only!r}; there are: {', '.join(one.name for one in runs)}")
    for one in [] if given.table else runs:
        if given.only in (None, one.name):
            train(one, given.out, given.processes)
            table(given.out, given.results, runs)
    if given.table:
        table(given.out, given.results, runs)


if __name__ == "__main__":
    main()
