"""What the papers claim about training, beside what was measured on mini: `python docs/training_claims.py [--check]`.

Writes docs/training_claims.md from the two tables that benchmarks/training_claims.py left in benchmarks/results.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vlmzip import spec
from vlmzip.evaluation.papers import published
from vlmzip.mini import weights_folder
from vlmzip.models import adapter_for
from vlmzip.training.explain import IN_THE_PAPER, explain
from vlmzip.training.schedule import SCHEMES, scheme

Row = dict[str, str]
PAGE = Path(__file__).with_suffix(".md")
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "training-claims.csv"
PLAIN, HEAVY, LIGHT = "no_compression", "llavolta(layer=1,stride=8)", "llavolta(layer=4,stride=4)"
POOLED = {"pool2d(factor=2)": "36 tokens", "pool2d(factor=3)": "16 tokens"}
#: Compressors of LLaVolta's Table 3: the training with each, what it answers with, the paper's name.
COMPRESSORS = {
    "random": ("random-in-llm", "random_tokens(site=in_llm,keep=18,layer=1)", "random_tokens"),
    "k-means": ("kmeans-in-llm", "kmeans(site=in_llm,keep=18,layer=1)", "kmeans"),
    "attention (FastV)": ("fastv-in-llm", "fastv(keep=18,layer=1)", "fastv"),
    "pooling (LLaVolta)": ("heavy", HEAVY, "llavolta"),
}
LAST = "last-stage-compression"
#: Tokens of text in a record of the training data: the mean of every fortieth, measured once.
TEXT = 128

HEAD = """
Made by `python docs/training_claims.py` from what `python benchmarks/training_claims.py --out runs/claims` measured
({device}, two processes of one thread, torch {torch}, transformers {transformers}, commit {commit}).

All start from one model: [mini](mini.md)'s encoder, and an LLM that has seen captions and 240 steps of questions,
without compression. Each is trained for {steps} steps of 16 pictures with up to twelve questions each (tuning: a
tenth), projector and LLM at 1.2e-3, bfloat16 autocast; seeds draw the records. Scores are percent of {questions}
test questions. mini is a model of 6.4 million weights, trained here for minutes: what holds on it may not hold on
LLaVA, and the other way round. The papers' numbers are means over real benchmarks.

None, last-stage, DFMR, Random and VisionZip's tuning are to be run with three seeds; where fewer stand here, the rest
is not run yet: the same command goes on.
"""
DIFFERENCES = """
Differences in percentage points, paired by question; 95 % intervals from drawing the test pictures anew, which leaves
out how much another seed would change: where there are several seeds, each is named. *more*, *less*: the interval does
not hold zero; *open*: it does.
"""
STAGES = f"""
CR and FLOPs of the LLM are counted for mini with {TEXT} tokens of text, which no compression touches. LLaVA's are fewer
beside more visual tokens, and it saves more. CPU seconds are the first process's for all of training, encoder, reading
and optimiser included, while the cores did other work too, which blurs them by some percent; `none` and
`last-stage-compression` are means of their seeds. [docs/training.md](training.md) has the time of single steps at
LLaVA's proportions.
"""
IN_LLM = """
18 of 144 tokens behind layer 1 of 8 (the paper: 72 of 576 behind layer 2 of 32); one seed.
"""
LENGTHS = """
Scores of each training (rows) by what it answers with. DFMR's threshold is set so that it keeps as many tokens of
validation pictures as Random does on average. `pool2d-2` is one seed. *padding*: the share of the LLM's input in
training that was padding.
"""
TUNING = """
Without compression the model scores {score}. Tuning: the projector alone, a tenth of the records, a tenth of the steps,
on that model.
"""

#: What is claimed, what the paper prints, and the difference that tells (a name in the CSV).
CLAIMS = (
    (
        "LLaVolta's last-stage scheme loses nothing, answering compressed",
        "62.1 to 61.8",
        "last stage compressed, answering so",
    ),
    ("the same model, answering without compression", "", "last stage compressed, answering without"),
    ("two-stage", "61.5 to 61.8", "two-stage"),
    ("three-stage-deeper", "61.8 to 61.8", "three-stage-deeper"),
    ("three-stage-wider", "61.3 to 61.8", "three-stage-wider"),
    ("four-stage-wider-then-deeper", "61.8 to 61.8", "four-stage-wider-then-deeper"),
    ("four-stage-deeper-then-wider", "61.9 to 61.8", "four-stage-deeper-then-wider"),
    (
        "always heavily compressed (layer 2, stride 8), answering so",
        "60.3 to 61.8 (Table 5)",
        "always compressed, answering so",
    ),
    (
        "that model collapses when it answers without compression",
        "GQA 55.9 to 62.0, MMB 47.4 to 64.3 (Table 9)",
        "always compressed, answering without",
    ),
    ("before retraining, attention beats pooling: pooling − FastV", "53.0 − 54.9", "pooling over fastv, before"),
    ("pooling − k-means, before", "53.0 − 54.0", "pooling over kmeans, before"),
    ("pooling − random, before", "53.0 − 47.3", "pooling over random, before"),
    ("after retraining, pooling beats attention: pooling − FastV", "60.4 − 57.0", "pooling over fastv, after"),
    ("pooling − k-means, after", "60.4 − 57.9", "pooling over kmeans, after"),
    ("pooling − random, after", "60.4 − 50.8", "pooling over random, after"),
    (
        "DFMR, trained and used, beats the baseline: over no compression",
        "+3.44 % (second-hand, over which baseline unknown)",
        "dfmr over no compression",
    ),
    ("DFMR trained over DFMR untrained", "", "dfmr, trained over untrained"),
    ("DFMR over Random, each trained and answering in its own way, same mean of tokens", "", "dfmr over random"),
    (
        "training with DFMR over training with Random, both answering with DFMR",
        "",
        "dfmr over random, both choosing by complexity",
    ),
    ("the same, both answering at factors 1, 2 and 3", "", "dfmr over random, at fixed factors"),
    (
        "DFMR's choice of factors over a choice by lot, in the model trained with DFMR",
        "",
        "choosing by complexity over by lot",
    ),
    (
        "trained at factor 2 throughout over trained with DFMR, both at factor 2",
        "",
        "factor 2 throughout over dfmr, at factor 2",
    ),
    ("VisionZip tuned over training-free, 33 %", "+0.6 points of the relative average", "visionzip(keep=48), tuned"),
    ("22 %", "+0.8", "visionzip(keep=32), tuned"),
    ("11 %", "+1.2", "visionzip(keep=16), tuned"),
    (
        "VisionZip tuned over the projector tuned as much without it, 33 %",
        "",
        "visionzip(keep=48), tuned with over without",
    ),
    ("22 %", "", "visionzip(keep=32), tuned with over without"),
    ("11 %", "", "visionzip(keep=16), tuned with over without"),
    (
        "VisionZip in all steps from the base over training-free, 33 % (the paper: from scratch)",
        "100.6 % against 98.5 %",
        "visionzip(keep=48), throughout",
    ),
    ("22 %", "99.6 % against 97.6 %", "visionzip(keep=32), throughout"),
    ("11 %", "97.1 % against 94.0 %", "visionzip(keep=16), throughout"),
)


def page(rows: Sequence[Row], differences: Sequence[Row]) -> str:
    about = {name: rows[0][name] for name in ("device", "torch", "transformers", "questions")}
    about["commit"] = " and ".join(dict.fromkeys(row["commit"] for row in rows))
    about["questions"] = f"{int(rows[0]['questions']):,}"
    head = HEAD.format(**about, steps=max(int(row["steps"]) for row in rows))
    chapters = {
        "# The papers' claims on training, tried on mini": (head, []),
        "## Claim by claim": (DIFFERENCES, _claims({row["difference"]: row for row in differences})),
        "## LLaVolta's schemes (Table 1)": (STAGES, _schemes(rows)),
        "## Compressors in the LLM before and after retraining (LLaVolta's Table 3)": (IN_LLM, _compressors(rows)),
        "## Varying lengths (LLaVA-Zip)": (LENGTHS, _lengths(rows)),
        "## VisionZip": (TUNING.format(score=_score(rows, "none", PLAIN)), _zips(rows)),
    }
    return "\n".join("\n".join([title, text, *lines, *[""] * bool(lines)]) for title, (text, lines) in chapters.items())


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]


def _claims(found: dict[str, Row]) -> list[str]:
    lines = []
    for claim, printed, name in CLAIMS:
        row = found.get(name)
        if row is None:
            lines.append([claim, printed, "not run", ""])
            continue
        low, high = float(row["low"]), float(row["high"])
        by_seed = ", ".join(f"{float(one):+.1f}" for one in row["by_seed"].split())
        seeds = f"; {by_seed}" if int(row["seeds"]) > 1 else ""
        measured = f"{float(row['points']):+.1f} ({low:+.1f} to {high:+.1f}{seeds})"
        lines.append([claim, printed, measured, "more" if low > 0 else "less" if high < 0 else "open"])
    return _table(["claim", "published", "on mini: points (95 %; seed by seed)", ""], lines)


def _score(rows: Sequence[Row], training: str, answers_with: str) -> str:
    """The mean over seeds."""
    found = [row for row in rows if _of(row) == training and spec.read(row["answers_with"]) == spec.read(answers_with)]
    return f"{mean(float(row['score']) for row in found):.1f}" if found else "—"


def _of(row: Row) -> str:
    """The training without its seed."""
    return row["training"].partition("-seed")[0]


def _seconds(rows: Sequence[Row], training: str) -> float | None:
    found = {row["training"]: float(row["cpu_seconds"]) for row in rows if _of(row) == training and row["cpu_seconds"]}
    return mean(found.values()) if found else None


def _schemes(rows: Sequence[Row]) -> list[str]:
    with torch.device("meta"):
        adapter = adapter_for(AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(weights_folder())))
    layers, plain_seconds = adapter.profile().layers, _seconds(rows, "none")
    lines = []
    for name in SCHEMES:
        cost = explain(scheme(name, layers), adapter, 1000, TEXT)
        seconds = _seconds(rows, name)
        saved = "—" if seconds is None or plain_seconds is None else f"{seconds / plain_seconds - 1:+.0%}"
        used = _score(rows, name, LIGHT) if name == LAST else ""
        lines.append([f"`{name}`", f"{cost.ratio:.2f}", f"{cost.flops - 1:+.0%}", saved])
        lines[-1] += [_score(rows, name, PLAIN), used, *_printed(name)]
    head = ["scheme", "CR", "LLM FLOPs", "CPU seconds", "score without compression", "as it is used"]
    return _table([*head, "paper: average", "paper: hours"], lines)


def _printed(name: str) -> list[str]:
    setting = f"scheme={IN_THE_PAPER[name]}" if name in IN_THE_PAPER else ""
    table = [one for one in published("llavolta") if (one.table, one.setting.split(";")[0]) == ("Table 2", setting)]
    average = next(one.value for one in table if one.benchmark == "average of 13" and one.metric == "score")
    hours = next(one.value for one in table if one.metric == "training time")
    return [f"{average:.1f}", f"{hours:.1f}"]


def _compressors(rows: Sequence[Row]) -> list[str]:
    lines = []
    for name, (training, answers_with, method) in COMPRESSORS.items():
        lines.append([name, _score(rows, "none", answers_with), _score(rows, training, answers_with)])
        lines[-1] += [_average(method, "without retraining"), _average(method, "; retrained")]
    return _table(["compressor", "before", "after", "paper: before", "paper: after"], lines)


def _average(method: str, setting: str) -> str:
    table = [one for one in published("llavolta") if one.table == "Table 3" and one.method == method]
    found = [one for one in table if one.benchmark.startswith("average") and setting in one.setting]
    return f"{found[0].value:.1f}"


def _lengths(rows: Sequence[Row]) -> list[str]:
    ways = {PLAIN: "144 tokens", **POOLED}
    dfmr = next((row for row in rows if row["answers_with"].startswith("dfmr(")), None)
    if dfmr is not None:
        ways[dfmr["answers_with"]] = f"DFMR ({float(dfmr['reached']):.0%})"
    lines = []
    for training in ("none", "pool2d-2", "random-factor", "dfmr"):
        padding = {row["training"]: float(row["padding"]) for row in rows if _of(row) == training}
        share = f"{mean(padding.values()):.1%}" if padding else "—"
        lines.append([f"`{training}`", *(_score(rows, training, way) for way in ways), share])
    return _table(["trained with", *ways.values(), "padding"], lines)


def _zips(rows: Sequence[Row]) -> list[str]:
    lines = []
    for keep in (48, 32, 16):
        way = f"visionzip(keep={keep})"
        lines.append([f"{keep} ({keep / 144:.0%})", _score(rows, "none", way), _score(rows, f"{way}-tuned", way)])
        lines[-1].append(_score(rows, f"{way}-throughout", way))
    return _table(["tokens", "training-free", "tuned", "in all steps (one seed)"], lines)


def _read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where the page differs")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="CSV")
    given = parser.parse_args()
    text = page(_read(given.results), _read(given.results.with_stem(f"{given.results.stem}-differences")))
    if given.check:
        if PAGE.read_text(encoding="utf-8") != text:
            print(f"{PAGE.name} differs from the committed results: python docs/training_claims.py", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
