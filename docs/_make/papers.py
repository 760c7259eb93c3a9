"""Write docs/papers.md: the papers' printed numbers, recomputed with this library's classes.

python docs/_make/papers.py            writes the page
python docs/_make/papers.py --check    exits with 1 if the page is not what this would write
"""

import sys
import textwrap
from collections import Counter
from functools import cache
from pathlib import Path

from checked_page import write_or_check

from vlmzip import FastV, Grid, LLaVolta, Profile, QFormer, SparseVLM, VisionZip
from vlmzip.lab.papers import CERTAINTIES, Published, averages, papers
from vlmzip.lab.papers.averages import AVERAGED, Average, every_column, sets_that_fit
from vlmzip.lab.papers.published import read, tables
from vlmzip.lab.table import markdown
from vlmzip.methods.sparsevlm import PUBLISHED_LAYERS, SCHEDULES

PAGE = Path(__file__).resolve().parents[1] / "papers.md"
#: Files without a score. No command reads them, so they are not part of the package.
BESIDE = Path(__file__).with_name("published")
#: LLaVA-1.5-7B, the model of the papers' counts: 24 x 24 patches, 32 layers.
LLAVA = Profile(Grid(1, 24, 24), layers=32)
FULL = LLAVA.grid.size * LLAVA.layers
#: SparseVLM's authors drop after these layers and count what each layer leaves, so one layer before ours.
SPARSEVLM_AUTHORS = tuple(layer - 1 for layer in PUBLISHED_LAYERS)

HEAD = """# What the papers print

Look up the papers' printed numbers here, and see where they do not add up. The published numbers are CSV files in
`src/vlmzip/lab/papers/`, and in `docs/_make/published/` if no command reads them. The computed ones come from the
library's own classes, on LLaVA-1.5-7B: 576 visual tokens, 32 layers. A dash is a number that the files do not have.
`python docs/_make/papers.py` writes this page, and the tests check it.
"""


def main() -> int:
    return write_or_check(PAGE, page, __doc__)


def page() -> str:
    parts = [HEAD, files(), llavolta(), sparsevlm(), visionzip(), recomputed(), inconsistencies()]
    return "\n".join(part.strip() + "\n" for part in parts)


@cache
def every_table() -> dict[str, tuple[Published, ...]]:
    """Return the rows of every file by its name: those of the package, and those beside it."""
    beside = {path.name: read(path.read_text(encoding="utf-8")) for path in BESIDE.glob("*.csv")}
    return dict(sorted((tables() | beside).items()))


def published(paper: str) -> list[Published]:
    """Return a paper's numbers, file by file."""
    return [row for rows in every_table().values() for row in rows if row.paper == paper]


# --- what is there ------------------------------------------------------------------------------------------------


def files() -> str:
    kinds = list(CERTAINTIES)
    rows = []
    for name, content in every_table().items():
        count = Counter(row.certainty for row in content)
        rows.append([name, ", ".join(dict.fromkeys(row.table for row in content)), len(content)])
        rows[-1] += [count[kind] or "" for kind in kinds]
    meanings = "\n".join(f"- *{kind}*: {meaning}." for kind, meaning in CERTAINTIES.items())
    total = sum(row[2] for row in rows)
    return f"## The files\n\n{table(['file', 'table', 'rows', *kinds], rows)}\n\n{total:,} rows in all.\n\n{meanings}\n"


# --- LLaVolta -----------------------------------------------------------------------------------------------------


def llavolta() -> str:
    return f"""
## LLaVolta: tokens and compression ratio

Layer and stride give the tokens over all layers and CR = {FULL:,} / tokens (equation 3).

Table 1, the training stages:

{table(["scheme", "stage", "layer", "stride", "tokens", "CR %", "printed CR %"], stage_rows())}

Table 4:

{table(["method", "setting", "tokens", "printed tokens", "CR %", "printed CR %"], table_4())}

Table 5. Most of its compression ratios are not in the files, but Table 1 prints the same layers and strides:

{table(["layer", "stride", "tokens", "CR %", "printed CR %", "printed in Table 1"], table_5())}

Table 2 gives means over the stages of Table 1. Most are not the means:

{table(["scheme", "mean tokens", "printed", "CR %", "printed CR %", "the printed number is"], table_2())}
"""


def stage_rows() -> list[list]:
    rows = []
    for row in published("llavolta"):
        if row.table == "Table 1":
            tokens = stage_tokens(row)
            place = [row.settings.get(name, "–") for name in ("layer", "stride")]
            numbers = [tokens, f"{ratio(tokens):.2f}", number(row) if "layer" in row.settings else "none"]
            rows.append([row.settings["scheme"], row.settings["stage"], *place, *numbers])
    return rows


def stage_tokens(row: Published) -> int:
    """Return the tokens over all layers for a row's layer and stride, or all tokens if it has none."""
    if "layer" not in row.settings:
        return FULL
    layer, stride = (tuple(map(int, row.settings[name].split(","))) for name in ("layer", "stride"))
    return sum(LLaVolta(layer=layer, stride=stride).tokens_by_layer(LLAVA))


def ratio(tokens: float) -> float:
    """Return the compression ratio in percent."""
    return 100 * FULL / tokens


def table_4() -> list[list]:
    rows = []
    for method in ("qformer", "llavolta"):
        own = {row.metric: row for row in published("llavolta") if (row.table, row.method) == ("Table 4", method)}
        row = own["tokens over all layers"]
        tokens = sum(QFormer().tokens_by_layer(LLAVA)) if method == "qformer" else stage_tokens(row)
        printed = own["compression ratio"]
        setting = f"{QFormer().queries} queries" if method == "qformer" else row.setting
        rows.append([method, setting, tokens, number(row), f"{ratio(tokens):.2f}", number(printed)])
    return rows


def table_5() -> list[list]:
    """Return the rows that have a layer, one for each setting."""
    own = [row for row in published("llavolta") if row.table == "Table 5" and "layer" in row.settings]
    first = {(r.settings["layer"], r.settings["stride"]): number(r) for r in ratios("Table 1") if "layer" in r.settings}
    here = {row.setting: number(row) for row in ratios("Table 5")}
    rows = []
    for row in {row.setting: row for row in own}.values():
        layer, stride = row.settings["layer"], row.settings["stride"]
        tokens = stage_tokens(row)
        printed = [here.get(row.setting, "–"), first.get((layer, stride), "–")]
        rows.append([layer, stride, tokens, f"{ratio(tokens):.2f}", *printed])
    return rows


def ratios(name: str) -> list[Published]:
    return [row for row in published("llavolta") if (row.table, row.metric) == (name, "compression ratio")]


def table_2() -> list[list]:
    rows = []
    for row in published("llavolta"):
        if (row.table, row.metric) == ("Table 2", "tokens over all layers"):
            stages = [stage_tokens(r) for r in ratios("Table 1") if r.settings["scheme"] == row.settings["scheme"]]
            mean = sum(stages) / len(stages)
            printed = next(r for r in ratios("Table 2") if r.setting == row.setting)
            numbers = [f"{mean:.0f}", number(row), f"{ratio(mean):.1f}", number(printed)]
            rows.append([row.settings["scheme"], *numbers, explained(stages, row.value)])
    return rows


def explained(stages: list[int], printed: float) -> str:
    """Name the sum of the same stages that gives the printed mean, or return "unexplained"."""
    count, rest = len(stages), sum(stages[1:])
    first = LLaVolta(layer=2, stride=8).tokens_by_layer(LLAVA)
    tried = {
        "the mean": sum(stages) / count,
        "0.33 of the sum": 0.33 * sum(stages),
        f"the mean, with {first[-1]} tokens in all 32 layers of stage 1": (first[-1] * len(first) + rest) / count,
        "the mean, with a quarter of stage 1": (stages[0] / 4 + rest) / count,
    }
    return next((name for name, value in tried.items() if abs(value - printed) < 1), "unexplained")


# --- SparseVLM and VisionZip --------------------------------------------------------------------------------------


def sparsevlm() -> str:
    rows = []
    for schedule, budgets in SCHEDULES.items():
        for budget, counts in budgets.items():
            ours = SparseVLM(schedule=schedule, budget=budget)
            theirs = SparseVLM(schedule=schedule, budget=budget, layer=SPARSEVLM_AUTHORS).tokens_by_layer(LLAVA)
            left = [theirs[layer] for layer in SPARSEVLM_AUTHORS]
            seen = ours.reached(LLAVA) * LLAVA.grid.size
            averages_ = [f"{sum(theirs) / LLAVA.layers:.2f}", f"{seen:.2f}"]
            rows.append([schedule, budget, listed(counts), listed(left), *averages_, f"{ours.reached(LLAVA):.1%}"])
    comment = SparseVLM(layer=(*SPARSEVLM_AUTHORS[:2], PUBLISHED_LAYERS[2]), recycle=0.0).tokens_by_layer(LLAVA)
    printed = next(number(row) for row in published("sparsevlm") if row.metric == "average tokens")
    columns = ["schedule", "budget", "kept", "left, with recycled", "average left", "average seen", "seen of 576"]
    return f"""
## SparseVLM: averages of the schedules

The authors drop tokens after layers {listed(SPARSEVLM_AUTHORS)} and count what each layer *leaves*.
Attention and MLP pay for what each layer *sees*.

{table(columns, rows)}

The comment in their code gives {printed} for 192. Without recycled tokens, and with the third cut one layer later, it
is {sum(comment) / LLAVA.layers:.2f}.
"""


def visionzip() -> str:
    rows = []
    for model, grid, crops in (
        ("LLaVA-1.5-7B", Grid(1, 24, 24), 1),
        ("LLaVA-NeXT-7B", Grid(1, 24, 24), 5),
        ("Video-LLaVA", Grid(1, 16, 16), 8),
    ):
        budgets = {int(r.keep) for r in published("visionzip") if r.model == model and r.compressed and r.keep}
        for budget in sorted(budgets):
            split = VisionZip(keep=budget // crops).split(grid.size)
            ours = " + ".join(str(crops * part) for part in split)
            printed = printed_split(model, budget)
            parts = f"{crops} x ({split[0]} + {split[1]})" if crops > 1 else ""
            rows.append([model, budget, f"{budget / (crops * grid.size):.1%}", ours, parts, printed])
    columns = ["model", "tokens", "of all", "dominant + contextual", "by crop or frame", "printed"]
    return f"""
## VisionZip: splits and percentages

Dominant tokens include CLS: 54 are 53 patches and CLS. LLaVA-NeXT has at most five crops, each with its own split.
Video-LLaVA has eight frames.

{table(columns, rows)}

The split of Video-LLaVA's 17 tokens per frame is not known; here it follows the ratio of the others.
"""


def printed_split(model: str, budget: int) -> str:
    rows = [r for r in published("visionzip") if (r.model, r.keep) == (model, str(budget))]
    parts = [number(r) for metric in ("dominant tokens", "contextual tokens") for r in rows if r.metric == metric]
    return " + ".join(parts) or "–"


# --- averages -----------------------------------------------------------------------------------------------------


def recomputed() -> str:
    every = [average for paper in papers() for average in averages(paper)]
    whole = [average for average in every if average.complete]
    part = [average for average in every if not average.complete]
    whole_columns = ["paper", "table", "row", "benchmarks", "printed", "recomputed", "rounding", ""]
    part_columns = ["paper", "table", "row", "printed", "columns here", "their mean", "missing ones' mean"]
    fits = sets_that_fit(every_column("visionzip", "LLaVA-NeXT-7B"))
    assert fits == [AVERAGED["visionzip", "LLaVA-NeXT-7B"]]
    return f"""
## Averages, recomputed from the printed columns

LLaVolta averages scores, with MME / 2000. The others average shares of the uncompressed model's scores, in percent.
*Rounding* is the largest gap that rounding of the columns and of the average can cause.

{table(whole_columns, [whole_row(a) for a in whole])}

VisionZip averages LLaVA-NeXT-7B over seven benchmarks without naming them. Only one choice of seven of its nine columns
gives all six averages: {listed(fits[0])}.

For these averages some columns are missing here. The last column is the mean that they must have if the printed average
is right:

{table(part_columns, [part_row(a) for a in part])}
"""


def whole_row(average: Average) -> list:
    row = average.row
    verdict = "" if average.agrees else "**differs**: " + average.known
    own = [f"{average.of}", number(row), f"{average.mean:.2f}", f"{average.error:.2f}", verdict]
    return [row.paper, row.table, named(row), *own]


def part_row(average: Average) -> list:
    row = average.row
    here = f"{len(average.parts)} of {average.of}"
    return [row.paper, row.table, named(row), number(row), here, f"{average.mean:.2f}", f"{average.missing:.1f}"]


def named(row: Published) -> str:
    return ", ".join(part for part in (row.method, row.setting, f"{row.keep} tokens") if part)


# --- inconsistencies ----------------------------------------------------------------------------------------------


def inconsistencies() -> str:
    points = [*llavolta_points(), *visionzip_points(), *points_between()]
    return "## Where the papers contradict themselves or each other\n\n" + "\n".join(map(bullet, points))


def llavolta_points() -> list[str]:
    eight = sum(LLaVolta(layer=8, stride=8).tokens_by_layer(LLAVA))
    stages = sum(LLaVolta(layer=(4, 12, 24), stride=(2, 2, 2)).tokens_by_layer(LLAVA))
    shallow, deep = (LLaVolta(layer=layer, stride=4).reached(LLAVA) for layer in (2, 16))
    kmeans = next(a for a in averages("llavolta") if a.known)
    science = kmeans.parts["ScienceQA"] + (kmeans.row.value - kmeans.mean) * kmeans.of
    highest = max(r.value for r in published("llavolta") if r.benchmark == "ScienceQA")
    average = "average (number not stated)"
    ours, base = (score("llavolta", "Table 10", method, average) for method in ("llavolta", "no_compression"))
    eighth, sixteenth = (ratio(sum(LLaVolta(layer=2, stride=stride).tokens_by_layer(LLAVA))) for stride in (8, 16))
    return [
        f"**LLaVolta, one ratio in two spellings.** Layer 2, stride 8 is {eighth:.2f} %: Tables 1 and 5 print 557,"
        f" Table 3 prints 556. Layer 2, stride 16 is {sixteenth:.2f} %, printed as 825: truncated, not rounded.",
        "**LLaVolta, Table 2.** Only the last-stage row gives the means of its stages, in tokens and ratio. The table"
        " above says what the others are, where we found it; 10,062 for the two-stage scheme remains unexplained.",
        f"**LLaVolta, Table 3.** K-Means, retrained: the columns give {kmeans.mean:.2f}, the paper {kmeans.row.value}."
        f" ScienceQA ({kmeans.parts['ScienceQA']}) stands out, but does not explain the average alone: it would have"
        f" to be {science:.1f}, and no ScienceQA in these tables is above {highest}.",
        f"**LLaVolta, Tables 3 and 5.** Layer 2, stride 8, retrained: average"
        f" {score('llavolta', 'Table 3', 'llavolta', 'average of 13', 'layer=2; stride=8; retrained')} in one,"
        f" {score('llavolta', 'Table 5', 'llavolta', 'average of 13', 'layer=2; stride=8; trained and tested with it')}"
        " in the other.",
        f"**LLaVolta, Table 7.** Layer 8, stride 8 is printed as 266 and 267 %. Equation 3 gives {eight} tokens,"
        f" {ratio(eight):.1f} %. The table's progressive schedule (by 2 from layer 4, 12 and 24) gives {stages} tokens,"
        f" {ratio(stages):.1f} %.",
        f"**LLaVolta, Table 9.** {table_9()} Table 2 gives means of three runs; what Table 9 gives is not recorded. Its"
        " tokens and compression ratios are those of another table.",
        f"**LLaVolta, Table 10.** The caption claims higher scores; the average is {ours} against {base}.",
        f"**LLaVolta, proof of concept.** The text credits layer 16, stride 4 with two losses: about 1 % and, at up to"
        f" 70 % fewer tokens, 3 %. That setting keeps {deep:.1%}; layer 2, stride 4 keeps {shallow:.1%} and is probably"
        " what was meant.",
    ]


def table_9() -> str:
    """Compare its rows without and with an even split with the same training in Table 2."""
    parts = []
    for split, method, setting, name in (
        ("0/100", "no_compression", "", "no compression"),
        ("50/50", "llavolta", "scheme=two", "the two-stage scheme"),
    ):
        own = [r for r in published("llavolta") if r.table == "Table 9" and r.settings.get(SPLIT) == split]
        gaps = {r.benchmark: r.value - score("llavolta", "Table 2", method, r.benchmark, setting) for r in own}
        differing = {name: gap for name, gap in gaps.items() if gap}
        shown = ", ".join(f"{name} {gap:+.1f}" for name, gap in differing.items())
        parts.append(
            f"Split {split} should be {name} of Table 2; {len(differing)} of {len(gaps)} columns differ ({shown})."
        )
    return " ".join(parts)


#: The field of Table 9's settings that says how the epoch was split.
SPLIT = "percent of the epoch in stage 1/2"


def visionzip_points() -> list[str]:
    defaults = [r for r in published("visionzip") if r.setting == "as its functions' defaults"]
    seven, thirteen = ("LLaVA-NeXT-7B", "LLaVA-NeXT-13B")
    times = [r for r in published("visionzip") if r.metric == "total time"]
    total = {(r.table, r.keep, r.model): r.value for r in times if not r.setting}
    again = next(r.value for r in times if r.setting)
    qwen = [r for r in published("visionzip") if r.table == "README for Qwen2.5-VL" and r.unit == "% of all tokens"]
    ran = [r for r in published("visionzip") if r.setting == "run again" and r.keep == "64"]
    apart = ", ".join(f"{r.benchmark} {r.value:g} against {printed_64(r.benchmark):g}" for r in ran)
    return [
        f"**VisionZip, defaults of the code.** {listed(number(r) for r in defaults)} make"
        f" {sum(r.value for r in defaults):.0f} tokens, a budget in no table.",
        "**VisionZip, paper and code.** The paper averages a cluster. The code adds the mean of the assigned tokens to"
        " the target. The published numbers are the code's (`merge` of `visionzip`).",
        f"**VisionZip, splits.** 5.4 to 1 in the tables; for Qwen2.5-VL {number(qwen[0])} + {number(qwen[1])} and"
        f" {number(qwen[2])} + {number(qwen[3])} % of all tokens, which are {qwen[0].value / qwen[1].value:g} to 1 and"
        f" {qwen[2].value / qwen[3].value:g} to 1.",
        f"**VisionZip, times.** LLaVA-NeXT-7B on TextVQA takes {total['13B and 7B', '2880', seven]:g} s in one place,"
        f" {again:g} s in another. LLaVA-NeXT-13B: {total['13B and 7B', '2880', thirteen]:g} and"
        f" {total['times 13B', '2880', thirteen]:g} s whole, {total['13B and 7B', '640', thirteen]:g} and"
        f" {total['times 13B', '640', thirteen]:g} s with 640 tokens; the second pair does not name its benchmark.",
        f"**VisionZip, run again by others** at 64 tokens: {apart}. Only POPE is far apart; the rerun gives"
        " accuracy, and the paper's metric is not recorded.",
        "**VisionZip, averages.** They cover eleven benchmarks for LLaVA-1.5-7B, nine for LLaVA-1.5-13B and seven for"
        " LLaVA-NeXT-7B, so averages of different models are not comparable.",
    ]


def points_between() -> list[str]:
    all_frames = (
        int(score("llavolta", "Table 8", "no_compression", "", metric="tokens over all layers")) // LLAVA.layers
    )
    clip = next(r for r in published("visionzip") if r.model == "Video-LLaVA" and not r.compressed)
    seen = SparseVLM(budget=192).reached(LLAVA) * LLAVA.grid.size
    fastv = FastV(layer=2, keep="50%").reached(LLAVA)
    return [
        f"**Tokens of Video-LLaVA.** LLaVolta counts 8 x {all_frames // 8} = {all_frames}, VisionZip"
        f" 8 x {int(clip.keep) // 8} = {clip.keep}.",
        f"**192 tokens.** Every layer sees VisionZip's 192. SparseVLM counts what its layers leave; they see"
        f" {seen:.1f}. A method that acts in layer K pays for all tokens before it: FastV at K = 2 with half of the"
        f" tokens keeps {fastv:.1%}.",
        "**One average, several numbers.** VisionZip at 64 tokens on LLaVA-1.5-7B: "
        + "; ".join(f"{value} ({paper}, {what})" for paper, what, value in visionzip_at_64())
        + ". The benchmarks and runs differ; do not mix rows of different papers.",
    ]


def visionzip_at_64() -> list[tuple[str, str, str]]:
    rows = [r for paper in papers() for r in published(paper)]
    own = [r for r in rows if (r.model, r.method, r.setting, r.keep) == ("LLaVA-1.5-7B", "visionzip", "", "64")]
    return [(r.paper, r.benchmark, number(r)) for r in own if r.metric == "relative score"]


def printed_64(benchmark: str) -> float:
    own = [r for r in published("visionzip") if (r.table, r.method, r.setting) == ("Table 1", "visionzip", "")]
    return next(r.value for r in own if (r.keep, r.benchmark) == ("64", benchmark))


# --- small things -------------------------------------------------------------------------------------------------


def score(paper: str, name: str, method: str, benchmark: str, setting: str = "", metric: str = "score") -> float:
    """Return the value of the matching row; without a setting, of the first."""
    own = [
        r for r in published(paper) if (r.table, r.method, r.benchmark, r.metric) == (name, method, benchmark, metric)
    ]
    return next(r.value for r in own if setting in ("", r.setting))


def number(row: Published) -> str:
    return f"{row.value:.{row.decimals}f}"


def bullet(point: str) -> str:
    return textwrap.fill(f"- {point}", 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def listed(values) -> str:
    return ", ".join(map(str, values))


def table(columns: list, rows: list[list]) -> str:
    return markdown(columns, [list(map(str, row)) for row in rows]).rstrip("\n")


if __name__ == "__main__":
    sys.exit(main())
