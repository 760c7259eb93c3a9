"""The papers' claims on training, tried on mini: `python -m recipes.claims.training_claims --out runs/claims`.

Every run starts from the same mini (its encoder, and an LLM that has seen captions and some questions, without
compression), sees as many images, and takes the same number of steps. Stopped at any point, the same command goes on
where it was: runs that are complete are not trained again, answers that were given are not asked for again. `--only
NAME` runs one; `--table` only writes the results so far. The runs stand in the order in which they tell most;
`python docs/_make/training_claims.py` makes their page.
"""

import argparse
import csv
import itertools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recipes.benchmarks import RESULTS
from vlmzip import spec
from vlmzip.files import write_csv
from vlmzip.json_text import parse, read_lines
from vlmzip.lab.records import read_records
from vlmzip.lab.stats import Bootstrap, estimate

STEPS, BATCH, QUESTIONS = 200, 16, 1024
#: Steps without compression of the base that all start from, with a seed of its own. An LLM that has seen captions
#: alone must first learn to look things up by name; that comes suddenly and drowns what is compared. LLaVA's can.
BASE_STEPS, BASE_SEED, WARM = 240, 0, "data/warm"
SEEDS = (1, 2, 3)
#: 15,360 images, of which a run sees those that its seed draws.
IMAGES = 15_360
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
#: LLaVolta's baseline with weights of its own (Table 4), as in configs/mini-qformer.yaml; HEAVY leaves about as many.
QFORMER = "qformer(queries=36,width=192,heads=6,depth=2)"
#: The mean of DFMR's tokens is to be Random's, (144 + 36 + 16) / 3 of 144, and once factor 2's.
SHARES = {"dfmr": (144 + 36 + 16) / 3 / 144, "dfmr-25": 36 / 144}


@dataclass(frozen=True)
class Training:
    """A model to train, and what it answers with."""

    name: str
    schedule: str
    answers_with: tuple[str, ...]
    """Beside the model without compression."""
    seed: int = SEEDS[0]
    settings: tuple[str, ...] = ()
    base: str = ""
    """The training that it goes on from; else the common base."""


def trainings(dfmr: str, quarter: str) -> list[Training]:
    """All runs, in the order in which they tell most."""
    none_with = (HEAVY, LIGHT, *OTHERS.values(), *FACTORS, dfmr, *ZIPS)
    varied = (dfmr, *FACTORS)

    def thrice(seed: int) -> list[Training]:
        """What is trained with three seeds."""
        mark, is_first = _mark(seed), seed == SEEDS[0]
        return [
            Training(f"none{mark}", "none", none_with if is_first else (LIGHT, *FACTORS, dfmr, *ZIPS), seed),
            Training(f"{LAST}{mark}", LAST, (LIGHT,), seed),
            Training(f"dfmr{mark}", dfmr, varied, seed),
            Training(f"random-factor{mark}", "random_factor", varied, seed),
            *[_tuned(zipped, (zipped,), zipped, seed) for zipped in ZIPS],
        ]

    runs = thrice(SEEDS[0])
    runs += [Training("heavy", HEAVY, (HEAVY,)), Training("pool2d-2", FACTORS[0], (FACTORS[0],))]
    runs += [Training(name, name, ()) for name in SCHEMES]
    runs += [Training(f"{name}-in-llm", written, (written,)) for name, written in OTHERS.items()]
    runs += [Training(f"{zipped}-throughout", zipped, (zipped,)) for zipped in ZIPS]
    runs += [Training("dfmr-25", quarter, (quarter,)), Training("qformer", QFORMER, (QFORMER,))]
    runs += [run for seed in SEEDS[1:] for run in thrice(seed)]
    # Tuned as much, but without compression: what more training of the projector does by itself.
    runs += [_tuned("none", ZIPS, "none", seed) for seed in SEEDS]
    return [*runs, Training(WARM, "none", (LIGHT,), BASE_SEED)]


def _mark(seed: int) -> str:
    """What the names of trainings with this seed end in."""
    return "" if seed == SEEDS[0] else f"-seed{seed}"


def _tuned(name: str, answers_with: tuple[str, ...], schedule: str, seed: int) -> Training:
    """VisionZip's efficient tuning: the projector alone, a tenth of the steps, on the model trained without it."""
    settings, mark = ("learn=projector", "fraction=10%", f"steps={STEPS // 10}"), _mark(seed)
    return Training(f"{name}-tuned{mark}", schedule, answers_with, seed, settings, base=f"none{mark}")


def train(one: Training, out: Path, processes: int) -> None:
    """Trains a model, unless it is there, and asks it its questions."""
    folder = out / one.name
    settings = [f"schedule={_quoted(one.schedule)}", f"steps={STEPS}", f"seed={one.seed}", *one.settings]
    train_model(out, folder, out / (one.base or WARM), settings, processes)
    methods = ",".join(one.answers_with) or "no_compression"
    if QFORMER in one.answers_with:  # its weights lie beside the model's
        methods = str(folder / "model" / "compressor.json")
    wanted = ["--methods", methods, "--keep", "as-set", "--limit", str(QUESTIONS), "--batch", "64"]
    _start(["eval", "--model", str(folder / "model"), *wanted, "--out", str(folder / "eval")], processes)


def _quoted(schedule: str) -> str:
    """In YAML's form: brackets and commas of a compressor must not be read as something else."""
    return json.dumps(schedule)


def train_model(out: Path, folder: Path, base: Path, settings: Sequence[str], processes: int) -> None:
    """Trains on the records in `out` with mini's recipe; a model that is there already is left, or refused if it was
    trained otherwise."""
    config = Path(__file__).resolve().parents[2] / "configs" / "mini.yaml"
    usual = [f"model={base / 'model'}", f"records={out / 'data' / 'records.json'}", f"out={folder}", f"batch={BATCH}"]
    changes = [word for setting in (*usual, *settings) for word in ("--set", setting)]
    _start(["train", str(config), *changes], processes)


def _start(command: list[str], processes: int) -> None:
    """A command of vlmzip in several processes of one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    print("vlmzip", *command, flush=True)
    subprocess.run([*launcher, "-m", "vlmzip.cli.main", *command], env=environment, check=True)


def prepare(out: Path, processes: int) -> list[str]:
    """Images, the base that all start from, and DFMR at the thresholds for `SHARES`; returns those."""
    data = out / "data"
    if not (data / "records.json").exists():
        make = [sys.executable, "-m", "recipes.mini.conversations", "--out", str(data)]
        subprocess.run([*make, "--images", str(IMAGES)], check=True)
    if not (data / "base" / "model" / "config.json").exists():
        make = [sys.executable, "-m", "recipes.mini.base", "--out", str(data)]
        subprocess.run([*make, "--processes", str(processes)], check=True)
    more = [f"schedule={_quoted('none')}", f"steps={BASE_STEPS}", f"seed={BASE_SEED}"]
    train_model(out, out / WARM, data / "base", more, processes)
    found = _calibrate(data / "base" / "model")
    return [f"dfmr(tau={found[name]})" for name in SHARES]


def _calibrate(model: Path) -> dict[str, str]:
    """The thresholds at which mini's 180 validation images keep `SHARES` of their tokens on average."""
    from vlmzip import DFMR
    from vlmzip.lab.tasks.mini import mini_task
    from vlmzip.runtime.calibration import measure, meet
    from vlmzip.runtime.loading import load

    loaded = load(str(model))
    calibration = mini_task(1).calibration
    assert calibration is not None  # mini has one
    measured = measure(loaded.model, calibration.images(), DFMR(), processor=loaded.processor)
    return {name: f"{meet(DFMR(), measured, share).compressor.tau:.4g}" for name, share in SHARES.items()}


@dataclass(frozen=True)
class Difference:
    """How much more one trained model scores than another: of each its name, and what it answers with.

    Several ways of answering are averaged. With several seeds, seed is compared with seed.
    """

    name: str
    more: tuple[str, ...]
    than: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS[:1]


def differences(dfmr: str, quarter: str) -> list[Difference]:
    """What the claims are about."""
    plain, all_factors = "no_compression", ("no_compression", *FACTORS)
    base = ("none", plain)
    pooled = {"before": ("none", HEAVY), "after": ("heavy", HEAVY)}
    found = [
        Difference("last stage compressed, answering so", (LAST, LIGHT), base, SEEDS),
        Difference("last stage compressed, answering without", (LAST, plain), base, SEEDS),
        *[Difference(name, (name, plain), base) for name in SCHEMES],
        Difference("always compressed, answering so", ("heavy", HEAVY), base),
        Difference("always compressed, answering without", ("heavy", plain), base),
        Difference("always compressed, answering without over answering so", ("heavy", plain), ("heavy", HEAVY)),
        Difference("q-former over pooling", ("qformer", QFORMER), ("heavy", HEAVY)),
    ]
    for name, written in OTHERS.items():
        other = {"before": ("none", written), "after": (f"{name}-in-llm", written)}
        found += [Difference(f"pooling over {name}, {when}", pooled[when], other[when]) for when in pooled]
    found += [
        Difference("dfmr over no compression", ("dfmr", dfmr), base, SEEDS),
        Difference("dfmr, trained over untrained", ("dfmr", dfmr), ("none", dfmr), SEEDS),
        Difference("dfmr over random", ("dfmr", dfmr), ("random-factor", *all_factors), SEEDS),
        Difference("dfmr over random, both choosing by complexity", ("dfmr", dfmr), ("random-factor", dfmr), SEEDS),
        Difference(
            "dfmr over random, at fixed factors", ("dfmr", *all_factors), ("random-factor", *all_factors), SEEDS
        ),
        Difference("choosing by complexity over by lot", ("dfmr", dfmr), ("dfmr", *all_factors), SEEDS),
        Difference("dfmr over factor 2", ("dfmr-25", quarter), ("pool2d-2", FACTORS[0])),
        Difference("factor 2 throughout over dfmr, at factor 2", ("pool2d-2", FACTORS[0]), ("dfmr", FACTORS[0])),
    ]
    for zipped in ZIPS:
        found.append(Difference(f"{zipped}, tuned", (f"{zipped}-tuned", zipped), ("none", zipped), SEEDS))
        found.append(
            Difference(f"{zipped}, tuned with over without", (f"{zipped}-tuned", zipped), ("none-tuned", zipped), SEEDS)
        )
        found.append(Difference(f"{zipped}, throughout", (f"{zipped}-throughout", zipped), ("none", zipped)))
    return found


class Scores:
    """What was answered, from the records of `vlmzip eval`: for each question right or not, and its image."""

    def __init__(self, out: Path) -> None:
        self.out, self._images = out, dict[str, str]()
        self._found: dict[str, dict[str, Any]] = {}

    def __call__(self, training: str, seed: int, answers_with: Sequence[str]) -> np.ndarray | None:
        """The mean over ways of answering; `None` where one of them is not complete."""
        name = training + _mark(seed)
        if name not in self._found:
            self._found[name] = self._read(self.out / name / "eval" / "records" / "mini")
        of_methods = [self._found[name].get(_settings(spec.read(written).to_dict())) for written in answers_with]
        if any(scores is None or len(scores) < QUESTIONS for scores in of_methods):
            return None
        if any(scores.keys() != self._images.keys() for scores in of_methods):
            raise SystemExit(f"{name} was asked other questions")
        return np.mean([[scores[sample] for sample in sorted(scores)] for scores in of_methods], axis=0)

    def images(self) -> list[str]:
        """Of each question, in the order of the scores."""
        return [self._images[sample] for sample in sorted(self._images)]

    def _read(self, folder: Path) -> dict[str, Any]:
        found: dict[str, dict[str, float]] = {}
        images = {}
        for path in sorted(folder.glob("*.jsonl")):
            for sample, record in read_records([path]).items():
                found.setdefault(_settings(record["compressor"]), {})[sample] = record["score"]
                images[sample] = record["image"]
        if len(images) == QUESTIONS:
            self._images = self._images or images
        return found


def _settings(compressor: Any) -> str:
    return json.dumps(compressor, sort_keys=True)


def compare(out: Path, dfmr: Sequence[str]) -> list[dict[str, object]]:
    """A line for each difference that is complete with some seed: percentage points, 95 % over images drawn anew."""
    scores, rows = Scores(out), []
    for one in differences(*dfmr):
        of_seeds = {}
        for seed in one.seeds:
            more, than = (scores(side[0], seed, side[1:]) for side in (one.more, one.than))
            if more is not None and than is not None:
                of_seeds[seed] = 100 * (more - than)
        if not of_seeds:
            continue
        mean = np.mean(list(of_seeds.values()), axis=0)
        found = estimate(Bootstrap(scores.images(), 0).share(mean, np.ones(len(mean))))
        by_seed = [round(float(values.mean()), 4) for values in of_seeds.values()]
        row = {"difference": one.name, "points": round(found.value, 4), "low": round(found.low, 4)}
        row |= {"high": round(found.high, 4), "seeds": len(of_seeds), "by_seed": " ".join(map(str, by_seed))}
        row |= {"more": ": ".join((one.more[0], ", ".join(one.more[1:])))}
        rows.append(row | {"than": ": ".join((one.than[0], ", ".join(one.than[1:])))})
    return rows


def table(out: Path, path: Path, dfmr: Sequence[str]) -> None:
    """One line for each trained model and what it answered with, and the differences, from what is there so far."""
    rows = []
    for one in trainings(*dfmr):
        results = out / one.name / "eval" / "results.csv"
        if not results.exists():
            continue
        logged = [parse(line.text) for line in read_lines(out / one.name / "log.jsonl")]
        with results.open(encoding="utf-8", newline="") as file:
            for answered in csv.DictReader(file):
                names = ("score", "low", "high", "reached", "questions", "device", "torch", "transformers", "commit")
                trained = {
                    "training": one.name,
                    "schedule": one.schedule,
                    "seed": one.seed,
                    "steps": logged[-1]["step"],
                }
                is_file = answered["method"].endswith("compressor.json")
                trained |= {"padding": padding(logged), "answers_with": QFORMER if is_file else answered["method"]}
                rows.append(trained | {name: answered[name] for name in names})
    if not rows:
        sys.exit(f"nothing is trained in {out} yet")
    write_csv(path, rows)
    write_csv(path.with_stem(f"{path.stem}-differences"), compare(out, dfmr))
    print(f"{len(rows)} results in {path}")


def padding(logged: list[dict[str, Any]]) -> float:
    """The share of the LLM's input that was padding, over all steps; a line is about those since the one before."""
    lines = [line for line in logged if "loss" in line]
    steps = [after - before for before, after in itertools.pairwise([0, *(line["step"] for line in lines)])]
    return round(sum(line["padding"] * count for line, count in zip(lines, steps, strict=True)) / sum(steps), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--only", metavar="NAME", help="one of the runs")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="train nothing")
    results = RESULTS / "training-claims.csv"
    parser.add_argument("--results", type=Path, default=results, metavar="CSV")
    given = parser.parse_args()
    dfmr = prepare(given.out, given.processes)
    runs = trainings(*dfmr)
    if given.only and given.only not in [one.name for one in runs]:
        parser.error(f"there is no run {given.only!r}; choose one of {', '.join(one.name for one in runs)}")
    for one in [] if given.table else runs:
        if given.only in (None, one.name):
            train(one, given.out, given.processes)
            table(given.out, given.results, dfmr)
    if given.table:
        table(given.out, given.results, dfmr)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{(used.ru_utime + used.ru_stime) / 3600:.2f} CPU-hours since this command began")


if __name__ == "__main__":
    main()
