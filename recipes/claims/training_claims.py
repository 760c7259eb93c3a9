"""The papers' claims about training, tested on mini: `python -m recipes.claims.training_claims --out runs/claims`.

Every run starts from the same mini (its encoder, and an LLM that has seen captions and some questions, without
compression), sees the same number of images and takes the same number of steps. If the command is stopped, the same
command resumes: it does not repeat complete runs or given answers. `--only NAME` runs one of them; `--table` only
writes the results so far. The most informative runs come first. `python docs/_make/training_claims.py` makes the page
of the results.
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
#: Steps without compression of the common base, with a separate seed. An LLM that has only seen captions must first
#: learn to look things up by name. It learns this suddenly, which would hide the differences to measure. LLaVA's LLM
#: can do it from the start.
BASE_STEPS, BASE_SEED, WARM = 240, 0, "data/warm"
SEEDS = (1, 2, 3)
#: Number of images. A run sees the images that its seed draws.
IMAGES = 15_360
SCHEMES = (
    "two-stage",
    "three-stage-deeper",
    "three-stage-wider",
    "four-stage-wider-then-deeper",
    "four-stage-deeper-then-wider",
)
LAST = "last-stage-compression"
#: LLaVolta's (layer, stride) of (2, 8) and (16, 4) in 32 layers, for an LLM of eight; 18 and 36 of 144 tokens remain.
HEAVY, LIGHT = "llavolta(layer=1,stride=8)", "llavolta(layer=4,stride=4)"
#: The other compressors of the paper's Table 3, at the same layer and count. VCC keeps 23 tokens: with a fine block it
#: cannot keep fewer of 144. The paper's keeps 81 of 576.
OTHERS = {
    "random": "random_tokens(site=in_llm,layer=1,keep=18)",
    "kmeans": "kmeans(site=in_llm,layer=1,keep=18)",
    "fastv": "fastv(layer=1,keep=18)",
    "vcc": "vcc(block=12,fine=1,layer=1)",
}
FACTORS = ("pool2d(factor=2)", "pool2d(factor=3)")
#: 33, 22 and 11 % of 144 tokens, the paper's 192, 128 and 64 of 576.
ZIPS = tuple(f"visionzip(keep={keep})" for keep in (48, 32, 16))
#: LLaVolta's Q-Former baseline (Table 4), as in configs/mini-qformer.yaml; its average budget is close to HEAVY's.
QFORMER = "qformer(queries=36,width=192,heads=6,depth=2)"
#: DFMR's average budgets: the mean of the random factors, (144 + 36 + 16) / 3 of 144 tokens, and that of factor 2.
SHARES = {"dfmr": (144 + 36 + 16) / 3 / 144, "dfmr-25": 36 / 144}


@dataclass(frozen=True)
class Training:
    """A model to train, and the compressors to evaluate it with."""

    name: str
    schedule: str
    answers_with: tuple[str, ...]
    """The compressors of the evaluation, in addition to no compression."""
    seed: int = SEEDS[0]
    settings: tuple[str, ...] = ()
    base: str = ""
    """The training whose model it starts from; default: the common base."""


def trainings(dfmr: str, quarter: str) -> list[Training]:
    """Return all runs, the most informative ones first."""
    none_with = (HEAVY, LIGHT, *OTHERS.values(), *FACTORS, dfmr, *ZIPS)
    varied = (dfmr, *FACTORS)

    def thrice(seed: int) -> list[Training]:
        """Return the trainings of one seed, of those that run with three seeds."""
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
    # A control: tuning the projector for as many steps without compression.
    runs += [_tuned("none", ZIPS, "none", seed) for seed in SEEDS]
    return [*runs, Training(WARM, "none", (LIGHT,), BASE_SEED)]


def _mark(seed: int) -> str:
    """Return the ending of the names of trainings with this seed."""
    return "" if seed == SEEDS[0] else f"-seed{seed}"


def _tuned(name: str, answers_with: tuple[str, ...], schedule: str, seed: int) -> Training:
    """Return VisionZip's efficient tuning: it trains the projector alone for a tenth of the steps, from `none`."""
    settings, mark = ("learn=projector", "fraction=10%", f"steps={STEPS // 10}"), _mark(seed)
    return Training(f"{name}-tuned{mark}", schedule, answers_with, seed, settings, base=f"none{mark}")


def train(training: Training, out: Path, processes: int) -> None:
    """Train a model, unless it exists, and evaluate it."""
    folder = out / training.name
    settings = [f"schedule={_quoted(training.schedule)}", f"steps={STEPS}", f"seed={training.seed}", *training.settings]
    train_model(out, folder, out / (training.base or WARM), settings, processes)
    methods = ",".join(training.answers_with) or "no_compression"
    if QFORMER in training.answers_with:  # load its trained weights, which are saved with the model
        methods = str(folder / "model" / "compressor.json")
    options = ["--methods", methods, "--average-keep", "as-set", "--limit", str(QUESTIONS), "--batch", "64"]
    _start(["eval", "--model", str(folder / "model"), *options, "--out", str(folder / "eval")], processes)


def _quoted(schedule: str) -> str:
    """Quote a schedule for YAML, which would misread a compressor's brackets and commas."""
    return json.dumps(schedule)


def train_model(out: Path, folder: Path, base: Path, settings: Sequence[str], processes: int) -> None:
    """Train on the records in `out` with mini's configuration.

    A finished model is left as it is. The command fails if the folder's model was trained with other settings.
    """
    config = Path(__file__).resolve().parents[2] / "configs" / "mini.yaml"
    usual = [f"model={base / 'model'}", f"records={out / 'data' / 'records.json'}", f"out={folder}", f"batch={BATCH}"]
    changes = [word for setting in (*usual, *settings) for word in ("--set", setting)]
    _start(["train", str(config), *changes], processes)


def _start(command: list[str], processes: int) -> None:
    """Run a command of vlmzip in several processes of one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    print("vlmzip", *command, flush=True)
    subprocess.run([*launcher, "-m", "vlmzip.cli.main", *command], env=environment, check=True)


def prepare(out: Path, processes: int) -> list[str]:
    """Make the images and the common base, and return DFMR with the thresholds for `SHARES`."""
    data = out / "data"
    if not (data / "records.json").exists():
        make = [sys.executable, "-m", "recipes.mini.conversations", "--out", str(data)]
        subprocess.run([*make, "--images", str(IMAGES)], check=True)
    if not (data / "base" / "model" / "config.json").exists():
        make = [sys.executable, "-m", "recipes.mini.base", "--out", str(data)]
        subprocess.run([*make, "--processes", str(processes)], check=True)
    more = [f"schedule={_quoted('none')}", f"steps={BASE_STEPS}", f"seed={BASE_SEED}"]
    train_model(out, out / WARM, data / "base", more, processes)
    taus = _calibrate(data / "base" / "model")
    return [f"dfmr(tau={taus[name]})" for name in SHARES]


def _calibrate(model: Path) -> dict[str, str]:
    """Return the thresholds at which mini's 180 validation images keep `SHARES` of their tokens on average."""
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
    """The difference in score between two trained models. Each side is a model's name and compressors to evaluate with.

    The scores of several compressors are averaged. With several seeds, models of the same seed are compared.
    """

    name: str
    more: tuple[str, ...]
    than: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS[:1]


def differences(dfmr: str, quarter: str) -> list[Difference]:
    """Return the differences that the claims are about."""
    plain, all_factors = "no_compression", ("no_compression", *FACTORS)
    base = ("none", plain)
    pooled = {"before": ("none", HEAVY), "after": ("heavy", HEAVY)}
    pairs = [
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
        pairs += [Difference(f"pooling over {name}, {when}", pooled[when], other[when]) for when in pooled]
    pairs += [
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
        pairs.append(Difference(f"{zipped}, tuned", (f"{zipped}-tuned", zipped), ("none", zipped), SEEDS))
        pairs.append(
            Difference(f"{zipped}, tuned with over without", (f"{zipped}-tuned", zipped), ("none-tuned", zipped), SEEDS)
        )
        pairs.append(Difference(f"{zipped}, throughout", (f"{zipped}-throughout", zipped), ("none", zipped)))
    return pairs


class Scores:
    """The scores and images of all questions, read from the records of `vlmzip eval`."""

    def __init__(self, out: Path) -> None:
        self.out, self._images = out, dict[str, str]()
        self._scores: dict[str, dict[str, Any]] = {}

    def __call__(self, training: str, seed: int, answers_with: Sequence[str]) -> np.ndarray | None:
        """Return the mean scores over the compressors, shape [questions]; `None` if one of them is not complete."""
        name = training + _mark(seed)
        if name not in self._scores:
            self._scores[name] = self._read(self.out / name / "eval" / "records" / "mini")
        of_methods = [self._scores[name].get(_settings(spec.read(written).to_dict())) for written in answers_with]
        if any(scores is None or len(scores) < QUESTIONS for scores in of_methods):
            return None
        if any(scores.keys() != self._images.keys() for scores in of_methods):
            raise SystemExit(f"{name} was asked other questions")
        return np.mean([[scores[sample] for sample in sorted(scores)] for scores in of_methods], axis=0)

    def images(self) -> list[str]:
        """Return the image of each question, in the order of the scores."""
        return [self._images[sample] for sample in sorted(self._images)]

    def _read(self, folder: Path) -> dict[str, Any]:
        scores: dict[str, dict[str, float]] = {}
        images = {}
        for path in sorted(folder.glob("*.jsonl")):
            for sample, record in read_records([path]).items():
                scores.setdefault(_settings(record["compressor"]), {})[sample] = record["score"]
                images[sample] = record["image"]
        if len(images) == QUESTIONS:
            self._images = self._images or images
        return scores


def _settings(compressor: Any) -> str:
    return json.dumps(compressor, sort_keys=True)


def compare(out: Path, dfmr: Sequence[str]) -> list[dict[str, object]]:
    """Return a row for each difference with at least one complete seed.

    Differences are in percentage points, with 95 % intervals from a bootstrap over images.
    """
    scores, rows = Scores(out), []
    for difference in differences(*dfmr):
        of_seeds = {}
        for seed in difference.seeds:
            more, than = (scores(side[0], seed, side[1:]) for side in (difference.more, difference.than))
            if more is not None and than is not None:
                of_seeds[seed] = 100 * (more - than)
        if not of_seeds:
            continue
        mean = np.mean(list(of_seeds.values()), axis=0)
        points = estimate(Bootstrap(scores.images(), 0).share(mean, np.ones(len(mean))))
        by_seed = [round(float(values.mean()), 4) for values in of_seeds.values()]
        row = {"difference": difference.name, "points": round(points.value, 4), "low": round(points.low, 4)}
        row |= {"high": round(points.high, 4), "seeds": len(of_seeds), "by_seed": " ".join(map(str, by_seed))}
        row |= {"more": ": ".join((difference.more[0], ", ".join(difference.more[1:])))}
        rows.append(row | {"than": ": ".join((difference.than[0], ", ".join(difference.than[1:])))})
    return rows


def table(out: Path, path: Path, dfmr: Sequence[str]) -> None:
    """Write the results so far: a row for each trained model and compressor, and a file with the differences."""
    rows = []
    for training in trainings(*dfmr):
        results = out / training.name / "eval" / "results.csv"
        if not results.exists():
            continue
        logged = [parse(line.text) for line in read_lines(out / training.name / "log.jsonl")]
        with results.open(encoding="utf-8", newline="") as file:
            for answered in csv.DictReader(file):
                names = ("score", "low", "high", "reached", "questions", "device", "torch", "transformers", "commit")
                trained = {
                    "training": training.name,
                    "schedule": training.schedule,
                    "seed": training.seed,
                    "steps": logged[-1]["step"],
                }
                is_file = answered["method"].endswith("compressor.json")
                trained |= {"padding": padding(logged), "answers_with": QFORMER if is_file else answered["method"]}
                rows.append(trained | {name: answered[name] for name in names})
    if not rows:
        sys.exit(f"no training in {out} is finished yet")
    write_csv(path, rows)
    write_csv(path.with_stem(f"{path.stem}-differences"), compare(out, dfmr))
    print(f"{len(rows)} results in {path}")


def padding(logged: list[dict[str, Any]]) -> float:
    """Return the share of padding in the LLM's input over all steps. A line covers the steps since the one before."""
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
    args = parser.parse_args()
    dfmr = prepare(args.out, args.processes)
    runs = trainings(*dfmr)
    names = [training.name for training in runs]
    if args.only and args.only not in names:
        parser.error(f"unknown run {args.only!r}; choose one of {', '.join(names)}")
    for training in [] if args.table else runs:
        if args.only in (None, training.name):
            train(training, args.out, args.processes)
            table(args.out, args.results, dfmr)
    if args.table:
        table(args.out, args.results, dfmr)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{(used.ru_utime + used.ru_stime) / 3600:.2f} CPU-hours since this command began")


if __name__ == "__main__":
    main()
