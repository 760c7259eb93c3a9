"""Compare the papers' claims about training with measurements on mini.

`python docs/_make/training_claims.py [--check]` writes docs/training_claims.md from the results of recipes/claims/ in
benchmarks/results.
"""

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from vlmzip import spec
from vlmzip.lab.papers import published
from vlmzip.lab.papers.llavolta import IN_THE_PAPER, explain_beside_paper
from vlmzip.lab.table import markdown
from vlmzip.mini import weights_folder
from vlmzip.models import family_of
from vlmzip.training.schedule import SCHEMES, scheme

Row = dict[str, str]
PAGE = Path(__file__).resolve().parents[1] / "training_claims.md"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "training-claims.csv"
PLAIN, HEAVY, LIGHT = "no_compression", "llavolta(layer=1,stride=8)", "llavolta(layer=4,stride=4)"
POOLED = {"pool2d(factor=2)": "36 tokens", "pool2d(factor=3)": "16 tokens"}
#: Compressors of LLaVolta's Table 3: the training with each, the compressor that it answers with, the paper's name.
COMPRESSORS = {
    "random": ("random-in-llm", "random_tokens(site=in_llm,keep=18,layer=1)", "random_tokens"),
    "k-means": ("kmeans-in-llm", "kmeans(site=in_llm,keep=18,layer=1)", "kmeans"),
    "attention (FastV)": ("fastv-in-llm", "fastv(keep=18,layer=1)", "fastv"),
    "VCC": ("vcc-in-llm", "vcc(block=12,fine=1,layer=1)", "vcc"),
    "pooling (LLaVolta)": ("heavy", HEAVY, "llavolta"),
}
LAST, WARM = "last-stage-compression", "data/warm"
QFORMER = "qformer(queries=36,width=192,heads=6,depth=2)"
#: Tokens of text in a record of the training data: the mean of every fortieth, measured once.
TEXT = 128

HEAD = """
Check here which of the papers' claims about training hold on mini:

- **LLaVolta's schemes.** mini learns less in as many steps; the paper's LLaVA loses nothing or half a point. Retraining
  with pooling does not make it better than the other compressors.
- **DFMR.** A model trained with DFMR answers better with DFMR. The gain over training with random factors is small. A
  model trained and used without compression, or (one seed) with a fixed factor that keeps as many tokens, answers
  better still.
- **VisionZip.** Tuning the projector with VisionZip helps: at 33 and 22 % of the tokens by two points or more with
  every seed, at 11 % unevenly.

mini is a model of 6.4 million weights, trained here for minutes. What holds on it may not hold on LLaVA, and vice
versa. The papers' numbers are means over real benchmarks.

All trainings start from one model: [mini](mini.md)'s encoder, and an LLM that has seen captions and 240 steps of
questions, without compression. Each takes {steps} steps of 16 images with up to twelve questions each (tuning: a
tenth), with projector and LLM at 1.2e-3 and bfloat16 autocast. Seeds draw the records; the factors that Random draws
are the same for all seeds. Scores are percent of {questions} test questions.

`python docs/_make/training_claims.py` writes this page from the results of
`python -m recipes.claims.training_claims --out runs/claims` ({device} for each of two processes, torch {torch},
transformers {transformers}; trained and answered with the library of commit {commit}). Later commits order the records
differently, and pack rows of different length side by side instead of padding them. Their results will differ as
much as those of another seed.
"""
DIFFERENCES = """
Differences are in percentage points, paired by question, with 95 % intervals from resampled test images. The
intervals do not include the effect of another seed. Rows with several seeds give the difference for each; all start
from the same base. *as claimed* and *contrary* mean that the interval excludes zero and all seeds agree in sign;
*open* covers the rest. If no paper makes a comparable claim, the row says *more* or *less*. A scheme of LLaVolta's
"loses nothing" if it loses no more than {margin} points, the most that one loses in the paper. Three seeds are few: a
t-interval over them alone would include zero in {t_open} of the {several} rows with three seeds. One seed proves even
less.
"""
STAGES = """
CR (compression ratio) and FLOPs of the LLM are counted for mini with {text} tokens of text, which no method
compresses. LLaVA has less text and more visual tokens, and saves more. *all FLOPs*: FLOPs of a training step, with
encoder, projector and output head. *time*: wall-clock time of the whole training, by
`python -m recipes.claims.scheme_time` ({steps} steps of 16 images, {repeats} times in turns, median, least and
greatest, commit {commit}). Scores here and below are for seed 1. Averages and hours are from the paper's Table 2. The
common base scores {base}. `none` answers as well with light compression as without. So the points are lost by training
with compression, not by answering with it. [docs/training.md](training.md) has the time of single steps at LLaVA's
proportions.
"""
IN_LLM = """
18 of 144 tokens from layer 1 of 8 on (the paper: 72 of 576 from layer 2 of 32 on); seed 1. [VCC](api/methods.md) was
added after these trainings, and has not been run. With a fine block its layers see at least 23 of 144 tokens; the
paper's 3,582 tokens over 32 layers (CR 514 %) are 81 of 576 from layer 2 on.

The paper's Table 4 has a Q-Former of 32 queries at 56.2, below pooling with 27 tokens per layer at 57.8. Here a
Q-Former of 36 queries scores {qformer}, and pooling with 34 tokens per layer {pooling}. So few steps do not teach a
Q-Former with random weights to read; more steps were not measured.
"""
LENGTHS = """
Rows are trainings, columns the compressors that the trained model answers with. DFMR's thresholds are set on validation
images, to keep as many tokens as Random does on average (45 %), and as many as factor 2 does (25 %; `dfmr-25`, which
answers with its own). On the test images they keep a little less and a little more, as the column heads say. *padding*:
the share of padding in the LLM's input during training, in the first process.
"""
TUNING = """
Without compression the model scores {score}. Tuning trains only the projector of that model, with a tenth of the
records and a tenth of the steps.
"""


#: Points of 100 that a scheme may lose and still count as losing nothing.
MARGIN = 0.5
#: Quantile of Student's t with two degrees of freedom, for 95 % over three seeds.
T_3 = 4.303


@dataclass(frozen=True)
class Claim:
    """A claim about training, and the difference (a name in the CSV) that tests it on mini."""

    text: str
    difference: str
    published: str = ""
    expected: Literal["more", "less", "not less", ""] = ""
    """The paper's claim; empty if no paper makes one, or if it was measured in another way."""

    def verdict(self, row: Row) -> str:
        border = -MARGIN if self.expected == "not less" else 0
        low, high = float(row["low"]) - border, float(row["high"]) - border
        if low <= 0 <= high or len({seed > border for seed in _seeds(row)}) > 1:
            return "open"
        found = "more" if low > 0 else "less"
        if not self.expected:
            return found
        return "as claimed" if (found == "less") == (self.expected == "less") else "contrary"


def _seeds(row: Row) -> list[float]:
    """Return the difference for each seed."""
    return [float(one) for one in row["by_seed"].split()]


def _printed(name: str) -> list[str]:
    """Return the paper's average of a scheme and its hours, from Table 2."""
    setting = f"scheme={IN_THE_PAPER[name]}" if name in IN_THE_PAPER else ""
    table = [one for one in published("llavolta") if (one.table, one.setting.split(";")[0]) == ("Table 2", setting)]
    average = next(one.value for one in table if one.benchmark == "average of 13" and one.metric == "score")
    hours = next(one.value for one in table if one.metric == "training time")
    return [f"{average:.1f}", f"{hours:.1f}"]


def _beside_none(name: str, which: int = 0) -> str:
    """Return the paper's numbers for a scheme and for training without compression."""
    return f"{_printed(name)[which]} against {_printed('none')[which]}"


PERCENT = {48: "33 %", 32: "22 %", 16: "11 %"}
CLAIMS = (
    Claim(
        "last-stage compression loses nothing, answering compressed",
        "last stage compressed, answering so",
        _beside_none(LAST),
        "not less",
    ),
    Claim("the same model, answering without compression", "last stage compressed, answering without"),
    *[
        Claim(f"{name} loses nothing", name, _beside_none(name), "not less")
        for name in SCHEMES
        if name not in ("none", LAST)
    ],
    Claim(
        "training heavily compressed throughout (layer 2, stride 8) loses, answering compressed",
        "always compressed, answering so",
        "60.3 against 61.8 (Table 5)",
        "less",
    ),
    Claim(
        "that model loses when it answers without compression",
        "always compressed, answering without",
        "GQA 55.9 against 62.0, MMBench 47.4 against 64.3, but POPE 86.6 against 85.9 (Table 9)",
        "less",
    ),
    Claim(
        "that model loses against itself answering with compression",
        "always compressed, answering without over answering so",
        "GQA 55.9 against 60.0, MMBench 47.4 against 65.0 (Tables 9 and 3)",
        "less",
    ),
    *[
        Claim(f"{when} retraining: pooling over {name}", f"pooling over {method}, {when}", published, expected)
        for when, name, method, published, expected in (
            ("before", "FastV", "fastv", "53.0 against 54.9", "less"),
            ("before", "k-means", "kmeans", "53.0 against 54.0", "less"),
            ("before", "random", "random", "53.0 against 47.3", "more"),
            ("before", "VCC", "vcc", "53.0 against 54.7", "less"),
            ("after", "FastV", "fastv", "60.4 against 57.0", "more"),
            ("after", "k-means", "kmeans", "60.4 against 57.9", "more"),
            ("after", "random", "random", "60.4 against 50.8", "more"),
            ("after", "VCC", "vcc", "60.4 against 58.5", "more"),
        )
    ],
    Claim("a Q-Former over pooling", "q-former over pooling", "56.2 against 57.8 (Table 4, at stride 64)"),
    Claim(
        "DFMR, trained and used, over no compression",
        "dfmr over no compression",
        "+3.44 % over an unknown baseline (second-hand)",
    ),
    Claim("DFMR trained over DFMR untrained", "dfmr, trained over untrained"),
    Claim("DFMR over Random, each answering as it was trained, 44 against 45 % of the tokens", "dfmr over random"),
    Claim(
        "DFMR over factor 2, each answering as it was trained, 26 against 25 % of the tokens",
        "dfmr over factor 2",
    ),
    Claim(
        "training with DFMR over training with Random, both answering with DFMR",
        "dfmr over random, both choosing by complexity",
    ),
    Claim("the same, both answering at factors 1, 2 and 3", "dfmr over random, at fixed factors"),
    Claim(
        "DFMR's choice of factors over a random choice, in the model trained with DFMR",
        "choosing by complexity over by lot",
    ),
    Claim(
        "trained at factor 2 throughout over trained with DFMR, both at factor 2",
        "factor 2 throughout over dfmr, at factor 2",
    ),
    *[
        Claim(
            f"VisionZip tuned over training-free, {PERCENT[keep]}",
            f"visionzip(keep={keep}), tuned",
            f"{points} points of the relative average",
            "more",
        )
        for keep, points in ((48, "+0.6"), (32, "+0.8"), (16, "+1.2"))
    ],
    *[
        Claim(
            f"VisionZip tuned over the projector tuned as long without it, {PERCENT[keep]}",
            f"visionzip(keep={keep}), tuned with over without",
        )
        for keep in PERCENT
    ],
    *[
        Claim(
            f"VisionZip in all steps from the base (the paper: from scratch) over training-free, {PERCENT[keep]}",
            f"visionzip(keep={keep}), throughout",
            published,
            "more",
        )
        for keep, published in (
            (48, "100.6 % against 98.5 % of uncompressed"),
            (32, "99.6 % against 97.6 % of uncompressed"),
            (16, "97.1 % against 94.0 % of uncompressed"),
        )
    ],
)


def page(rows: Sequence[Row], differences: Sequence[Row], times: Mapping[str, Row]) -> str:
    about = {name: rows[0][name] for name in ("device", "torch", "transformers", "questions")}
    about["commit"] = " and ".join(dict.fromkeys(row["commit"] for row in rows))
    about["questions"] = f"{int(rows[0]['questions']):,}"
    head = HEAD.format(**about, steps=rows[0]["steps"])
    by_name = {row["difference"]: row for row in differences}
    baseline = {"qformer": _score(rows, "qformer", QFORMER), "pooling": _score(rows, "heavy", HEAVY)}
    chapters = {
        "# The papers' claims on training, tried on mini": (head, []),
        "## Claim by claim": (
            DIFFERENCES.format(margin=MARGIN, **_over_seeds(differences)),
            _claims(by_name, times[LAST]),
        ),
        "## LLaVolta's schemes": (
            STAGES.format(**times["none"], text=TEXT, base=_score(rows, WARM, PLAIN)),
            _schemes(rows, times),
        ),
        "## Compressors in the LLM before and after retraining (LLaVolta's Table 3)": (
            IN_LLM.format(**baseline),
            _compressors(rows),
        ),
        "## Varying lengths (LLaVA-Zip)": (LENGTHS, _lengths(rows)),
        "## VisionZip": (TUNING.format(score=_score(rows, "none", PLAIN)), _zips(rows)),
    }
    return "\n".join("\n".join([title, text, *lines, *[""] * bool(lines)]) for title, (text, lines) in chapters.items())


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return markdown(head, lines).splitlines()


def _claims(found: dict[str, Row], last_stage: Row) -> list[str]:
    time = Claim("last-stage compression takes less time", "", f"-19% ({_beside_none(LAST, 1)} hours)", "less")
    change = {end: str(float(last_stage[end]) - 1) for end in ("low", "high")}
    lines = [[time.text, time.published, f"time: {_times(last_stage)[1]}", time.verdict({**change, "by_seed": ""})]]
    for claim in CLAIMS:
        row = found.get(claim.difference)
        if row is None:
            lines.append([claim.text, claim.published, "not run", ""])
            continue
        by_seed = ", ".join(f"{one:+.1f}" for one in _seeds(row))
        seeds = f"; {by_seed}" if len(_seeds(row)) > 1 else ""
        measured = f"{float(row['points']):+.1f} ({float(row['low']):+.1f} to {float(row['high']):+.1f}{seeds})"
        lines.append([claim.text, claim.published, measured, claim.verdict(row)])
    return _table(["claim", "published", "on mini: points (95 %; seed by seed)", ""], lines)


def _over_seeds(differences: Sequence[Row]) -> dict[str, int]:
    """Count the differences with three seeds, and those whose sign the seeds alone leave open."""
    several = [_seeds(row) for row in differences if len(_seeds(row)) == 3]
    return {"several": len(several), "t_open": sum(abs(mean(one)) <= T_3 * stdev(one) / 3**0.5 for one in several)}


def _score(rows: Sequence[Row], training: str, answers_with: str) -> str:
    """Return the score of one training. Names of other seeds' trainings end in the seed."""
    method = spec.read(answers_with)
    found = [row["score"] for row in rows if row["training"] == training and spec.read(row["answers_with"]) == method]
    return f"{float(found[0]):.1f}" if found else "—"


def _schemes(rows: Sequence[Row], times: Mapping[str, Row]) -> list[str]:
    with torch.device("meta"):
        family = family_of(AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(weights_folder())))
    layers = family.profile().layers
    lines = []
    for name in SCHEMES:
        cost = explain_beside_paper(scheme(name, layers), family, 1000, TEXT)
        used = _score(rows, name, LIGHT) if name in ("none", LAST) else ""
        lines.append([f"`{name}`", f"{cost.ratio:.0%}", f"{cost.flops - 1:+.0%}", *_times(times[name])])
        lines[-1] += [_score(rows, name, PLAIN), used, *_printed(name)]
    head = [
        "scheme",
        "CR",
        "LLM FLOPs",
        "all FLOPs",
        "time (least to greatest)",
        "score without compression",
        "with layer 4, stride 4",
    ]
    return _table([*head, "paper: average", "paper: hours"], lines)


def _times(row: Row) -> list[str]:
    """Return the limit and the measured time."""
    if row["scheme"] == "none":
        return ["", f"{float(row['seconds']):.0f} s"]
    less = {name: f"{float(row[name]) - 1:+.0%}" for name in ("limit", "time", "low", "high")}
    return [less["limit"], f"{less['time']} ({less['low']} to {less['high']})"]


def _compressors(rows: Sequence[Row]) -> list[str]:
    lines = []
    for name, (training, answers_with, method) in COMPRESSORS.items():
        lines.append([name, _score(rows, "none", answers_with), _score(rows, training, answers_with)])
        lines[-1] += [_average(method, "without retraining"), _average(method, "retrained")]
    return _table(["compressor", "before", "after", "paper: before", "paper: after"], lines)


def _average(method: str, setting: str) -> str:
    table = [one for one in published("llavolta") if one.table == "Table 3" and one.method == method]
    found = [one for one in table if one.benchmark.startswith("average") and setting in one.setting]
    return f"{found[0].value:.1f}"


def _lengths(rows: Sequence[Row]) -> list[str]:
    ways = {PLAIN: "144 tokens", **POOLED}
    for training in ("dfmr", "dfmr-25"):
        found = [row for row in rows if row["training"] == training and row["answers_with"].startswith("dfmr(")]
        ways |= {row["answers_with"]: f"DFMR ({float(row['reached']):.0%})" for row in found}
    lines = []
    for training in ("none", "pool2d-2", "random-factor", "dfmr", "dfmr-25"):
        padding = [f"{float(row['padding']):.1%}" for row in rows if row["training"] == training]
        lines.append([f"`{training}`", *(_score(rows, training, way) for way in ways), *(padding[:1] or ["—"])])
    return _table(["trained with", *ways.values(), "padding"], lines)


def _zips(rows: Sequence[Row]) -> list[str]:
    lines = []
    for keep in (48, 32, 16):
        way = f"visionzip(keep={keep})"
        lines.append([f"{keep} ({keep / 144:.0%})", _score(rows, "none", way), _score(rows, f"{way}-tuned", way)])
        lines[-1].append(_score(rows, f"{way}-throughout", way))
    return _table(["tokens", "training-free", "tuned", "in all steps"], lines)


def _read(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page differs")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="CSV")
    parser.add_argument("--times", type=Path, default=RESULTS.with_name("scheme-time.csv"), metavar="CSV")
    given = parser.parse_args()
    differences = given.results.with_stem(f"{given.results.stem}-differences")
    times = {row["scheme"]: row for row in _read(given.times)}
    text = page(_read(given.results), _read(differences), times)
    if given.check:
        if PAGE.read_text(encoding="utf-8") != text:
            print(
                f"{PAGE.name} differs from the committed results: python docs/_make/training_claims.py", file=sys.stderr
            )
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
