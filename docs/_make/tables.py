"""Make tables from committed results and from the methods: `python docs/_make/tables.py`, or `--check` in CI.

Each table stands between two comments, such as `<!-- results -->` and `<!-- end of results -->`. The results on mini
come from benchmarks/results/mini-study.csv, the results.csv of the full study on mini:

    vlmzip eval --methods METHODS --average-keep 75%,50%,25%,11%,5.6% --batch 60 --out runs/eval/mini
    cp runs/eval/mini/results.csv benchmarks/results/mini-study.csv

with METHODS as in docs/results.md, and the table of every method on mini from the file of methods_on_mini.py
(recipes/benchmarks/). The GPU tables of docs/results.md (speed, memory, cost of the selection) come from the files that
gpu.sh, selection_cost.py and `vlmzip bench` wrote on the GPU, the table of a CPU from those that `vlmzip bench --scale
1` wrote on one thread, the table of videos from the file of video_cost.py, and that of each method's selection from the
file of selection_by_method.py. The table of docs/store.md comes from the files of recipes/serving/store.py, that of
docs/vllm.md from the file of vllm_speed.py. The README takes its measured table from them, too, the published one from
vlmzip.lab.papers, the models from the results of `make conformance`, and the methods from the methods' files.
"""

import argparse
import csv
import difflib
import sys
from itertools import product
from math import log, sqrt
from pathlib import Path

from vlmzip import outline
from vlmzip.lab.conformance.results import Checked, committed, models_of
from vlmzip.outline import Facts
from vlmzip.sites import ATTENTION_OF_ENCODERS

ROOT = Path(__file__).resolve().parents[2]
NOTHING = "—"
PLAIN = "no_compression"
#: vLLM without compression, in the files of vllm_speed.py.
STOCK = "stock"
NEAR = 0.05
GPU = "NVIDIA-H200"
CPU = "1-thread"
MIB = 2**20
MEASURED = {"llava-1.5-7b": "LLaVA-1.5-7B, 576", "llava-next-7b": "LLaVA-NeXT-7B, 2,880"}
#: Well-known models by folder, in the order of the README. The README counts the others.
KNOWN = {
    "llava": "LLaVA-1.5", "llava_next": "LLaVA-NeXT", "llava_onevision": "LLaVA-OneVision",
    "mini_gemini": "Mini-Gemini", "video_llava": "Video-LLaVA", "qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL", "qwen3_5": "Qwen3.5", "internvl": "InternVL", "smolvlm": "SmolVLM",
    "idefics2": "Idefics2", "idefics3": "Idefics3", "paligemma": "PaliGemma", "gemma3": "Gemma 3",
    "gemma4": "Gemma 4", "mistral3": "Mistral 3", "molmo2": "Molmo 2", "glm4v": "GLM-4V", "kimi_k25": "Kimi K2.5",
    "minicpmv4_6": "MiniCPM-V 4.6", "deepseek_vl": "DeepSeek-VL", "janus": "Janus", "ovis2": "Ovis2",
    "lfm2_vl": "LFM2-VL", "aya_vision": "Aya Vision", "hunyuan_vl": "Hunyuan-VL", "aria": "Aria", "emu3": "Emu3",
    "fuyu": "Fuyu", "chameleon": "Chameleon",
}  # fmt: skip
ACTS = {"pixels": "on the pixels", "encoder": "inside the vision encoder", "in_llm": "inside the LLM"}
#: The groups of the README's methods, in order: where they act, and what they read.
READS = ("the visual tokens", "the encoder's attention", "the question")
PLACES = ("on the pixels", "inside the vision encoder", "before the LLM", "inside the LLM", "on videos")
GROUPS = [*product(PLACES, READS), ("at several places", "what its parts read")]
#: The simplest methods, by the letter that marks a method that beats them.
SIMPLEST = {"r": "random_tokens", "p": "pool2d", "k": "kmeans"}
PAPERS = ROOT / "src" / "vlmzip" / "lab" / "papers"


def study_table(rows: list[dict[str, str]]) -> list[str]:
    """Return methods down, budgets across, the uncompressed model first: score in percent ± half of its 95 % interval.

    A cell adds the tokens really kept if these miss the budget by more than a twentieth of it.
    """
    rows = [row for row in rows if row["task"] == "mini"]
    plain = next(row for row in rows if row["method"] == "no_compression")
    budgets = list(dict.fromkeys(row["budget"] for row in rows if row is not plain))
    lines = [f"| method | {' | '.join(budgets)} |", "| --- " * (len(budgets) + 1) + "|"]
    lines.append(f"| `no_compression`, all tokens | {score(plain)} |" + " |" * (len(budgets) - 1))
    for method in dict.fromkeys(row["method"] for row in rows if row is not plain):
        by_budget = {row["budget"]: row for row in rows if row["method"] == method}
        if any(row["score"] for row in by_budget.values()):
            lines.append(f"| `{method}` | " + " | ".join(score(by_budget[budget]) for budget in budgets) + " |")
    return lines


def score(row: dict[str, str]) -> str:
    if not row["score"]:
        return NOTHING
    shown = f"{float(row['score']):.1f} ± {(float(row['high']) - float(row['low'])) / 2:.1f}"
    return f"{shown} ({float(row['reached']):.1%})" if misses(row) else shown


def every_method_table(rows: list[dict[str, str]]) -> list[str]:
    """Return methods with their settings and positions down, budgets across. Cells have the accuracy in percent.

    ± are 1.96 standard errors. Letters mark the simplest methods that a method beats at the same budget.
    """
    plain = next(row for row in rows if row["method"] == PLAIN)
    rows = [row for row in rows if row is not plain]
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    lines = [f"| method | positions | {' | '.join(budgets)} |", "| --- " * (len(budgets) + 2) + "|"]
    lines.append(f"| `{PLAIN}`, all tokens | | {accuracy(plain)} |" + " |" * (len(budgets) - 1))
    for method, setting, positions in sorted({(row["method"], row["setting"], row["positions"]) for row in rows}):
        name = f"{method}({setting.replace(' ', ', ')})" if setting else method
        cells = []
        for budget in budgets:
            at = [row for row in rows if row["budget"] == budget and row.get("accuracy")]
            (row,) = [r for r in at if (r["method"], r["setting"], r["positions"]) == (method, setting, positions)] or [
                {}
            ]
            shown = accuracy(row) if row else NOTHING
            cells.append(shown if not row or misses(row) else shown + beaten(row, at))
        lines.append(f"| `{name}` | {positions} | {' | '.join(cells)} |")
    return lines


def accuracy(row: dict[str, str]) -> str:
    shown = f"{float(row['accuracy']):.1f} ± {1.96 * float(row['standard_error']):.1f}"
    return f"{shown} ({float(row['reached']):.1%})" if misses(row) else shown


def misses(row: dict[str, str]) -> bool:
    """Return whether the tokens really kept miss the budget by more than a twentieth of it."""
    wanted = float(row["budget"].rstrip("%")) / 100
    return abs(float(row["reached"]) - wanted) > NEAR * wanted


def beaten(row: dict[str, str], rows: list[dict[str, str]]) -> str:
    """Return the letters of the simplest methods that a method beats, among rows with the same budget.

    A method beats another one if it is ahead by two standard errors of the paired difference. Each of the simplest
    methods has its default settings and its better positions. One that misses the budget is not compared.
    """
    letters = ""
    for letter, name in SIMPLEST.items():
        rivals = [r for r in rows if r["method"] == name and not r["setting"] and not misses(r)]
        if row["method"] == name or not rivals:
            continue
        rival = max(rivals, key=lambda r: float(r["accuracy"]))
        differences = [int(a) - int(b) for a, b in zip(row["right"], rival["right"], strict=True)]
        mean = sum(differences) / len(differences)
        error = sqrt(sum((each - mean) ** 2 for each in differences)) / len(differences)
        letters += letter * (mean > 2 * error)
    return f" {letters}" if letters else ""


def speed_table(runs: list[dict[str, list[dict[str, str]]]], scope: str) -> list[str]:
    """Return runs down, methods across: speed-up and its share of the limit; `scope` as in the CSV."""
    methods = list(runs[0])[1:]
    lines = [f"| preset | batch | plain ms | limit | {' | '.join(f'`{name}`' for name in methods)} |"]
    lines.append("| --- " * (4 + len(methods)) + "|")
    for run in runs:
        of = {name: next(row for row in rows if row["scope"] == scope) for name, rows in run.items()}
        plain, limit = of["no_compression"], of["visionzip"]["flops_limit"]
        cells = (f"{float(of[m]['speed_up']):.2f}x, {float(of[m]['share_of_limit']):.0%}" for m in methods)
        lines.append(f"| {named(plain)} | {float(plain['ms']):.1f} | {float(limit):.2f}x | {' | '.join(cells)} |")
    return lines


def cpu_table(runs: list[dict[str, list[dict[str, str]]]]) -> list[str]:
    """Return a row for each method of each run: both scopes with speed-up, limit and its share, and the KV cache."""
    head = ["preset", "method", "visual tokens by layer"]
    head += [f"{scope} {name}" for scope in ("prefill", "TTFT") for name in ("s", "speed-up", "limit", "share")]
    head += ["KV MiB", "rounds"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for run in runs:
        for method, rows in run.items():
            cells = [f"`{rows[0]['preset']}`", f"`{method}`", rows[0]["visual_tokens"]]
            for row in rows:
                cells.append(f"{float(row['ms']) / 1000:.1f}")
                faster = f"{float(row['speed_up']):.2f}x ({ends(row, 'speed_up')})"
                limit, share = f"{float(row['flops_limit']):.2f}x", f"{float(row['share_of_limit']):.0%}"
                cells += [""] * 3 if method == PLAIN else [faster, limit, share]
            lines.append(f"| {' | '.join(cells)} | {int(rows[0]['kv_bytes']) / MIB:.0f} | {rows[0]['repeats']} |")
    return lines


def memory_table(runs: list[dict[str, list[dict[str, str]]]]) -> list[str]:
    """Return runs down: KV cache, peak memory and tokens per second of the plain model and of two methods."""
    methods = ("no_compression", "visionzip", "sparsevlm")
    columns = [f"{what} {name}" for what in ("KV MiB,", "peak MiB,", "tokens/s,") for name in ("plain", *methods[1:])]
    lines = [f"| preset | batch | {' | '.join(columns)} |", "| --- " * (2 + len(columns)) + "|"]
    for run in runs:
        rows = [run[name][0] for name in methods]
        cells = [f"{int(row[what]) / MIB:.0f}" for what in ("kv_bytes", "peak_bytes") for row in rows]
        cells += [f"{float(row['tokens_per_second']):.1f}" for row in rows]
        lines.append(f"| {named(rows[0])} | {' | '.join(cells)} |")
    return lines


def selection_table(files: list[list[dict[str, str]]]) -> list[str]:
    """Return a row for each file of selection_cost.py, by precision and images per batch."""
    lines = [
        "| dtype | images | plain ms | visionzip, time (quartiles) | selection | peak | eager, time | peak |",
        "| --- " * 8 + "|",
    ]
    for plain, visionzip, eager in sorted(files, key=lambda rows: (rows[0]["dtype"], int(rows[0]["batch"]))):
        times = f"{float(visionzip['time_ratio']):.2f}x ({ends(visionzip, 'time_ratio')})"
        selection = f"{float(visionzip['selection_over_encoder']):.1%}"
        memory = [f"{float(row['memory_ratio']):.2f}x ({float(row['peak_mib']):.0f} MiB)" for row in (visionzip, eager)]
        lines.append(
            f"| {plain['dtype']} | {plain['batch']} | {plain['median_ms']} | {times} | {selection} | {memory[0]}"
            f" | {float(eager['time_ratio']):.2f}x | {memory[1]} |"
        )
    return lines


def store_table(rows: list[dict[str, str]]) -> list[str]:
    """Return a row for each model that store.py measured, with the fastest first."""
    lines = [
        "| model | tokens | answers/s, files | from the store | speed-up (quartiles) | images/s, encoding | JPEG"
        " | store | all tokens |",
        "| --- " * 9 + "|",
    ]
    for row in sorted(rows, key=lambda row: -float(row["answers/s, store"])):
        kept = row["compressor"].partition("keep=")[2].rstrip(")")
        speed_up = f"{row['speed-up']}x ({row['first quartile']} to {row['third quartile']})"
        sizes = [f"{int(row[f'bytes per image, {name}']) / 1024:.0f} KiB" for name in ("JPEG", "store", "all tokens")]
        cells = [row["model"], f"{row['visual tokens']} → {kept}", row["answers/s, files"], row["answers/s, store"]]
        lines.append(f"| {' | '.join([*cells, speed_up, row['images/s, encoding'], *sizes])} |")
    return lines


def methods_table() -> list[str]:
    """Return a row of methods for each place where they act and each thing that they read, linked to the gallery."""
    groups: dict[tuple[str, str], list[str]] = {group: [] for group in GROUPS}
    for facts in map(Facts.of, outline.methods()):
        groups[group_of(facts)].append(f"[`{facts.name}`](docs/methods.md#{facts.name})")
    lines = ["| acts | reads | methods |", "| --- " * 3 + "|"]
    return lines + [f"| {acts} | {reads} | {', '.join(names)} |" for (acts, reads), names in groups.items() if names]


def group_of(facts: Facts) -> tuple[str, str]:
    """Return where a method acts by default, and what it reads."""
    if facts.kind == "chain":
        return GROUPS[-1]
    acts = "on videos" if facts.videos_only else ACTS.get(facts.sites[0], "before the LLM")
    if facts.text_aware:
        return acts, "the question"
    return acts, "the encoder's attention" if set(facts.needs) & ATTENTION_OF_ENCODERS else "the visual tokens"


def published_table(rows: list[dict[str, str]]) -> list[str]:
    """Return methods down, kept tokens across: VisionZip's Table 1, in percent of the uncompressed score."""
    rows = [row for row in rows if row["benchmark"] == "average of 11"]
    budgets = sorted({row["keep"] for row in rows}, key=int, reverse=True)
    lines = [f"| method | {' | '.join(f'{keep} of 576' for keep in budgets)} |", "| --- " * (len(budgets) + 1) + "|"]
    for method, setting in dict.fromkeys((row["method"], row["setting"]) for row in rows):
        scores = {row["keep"]: row["value"] for row in rows if (row["method"], row["setting"]) == (method, setting)}
        name = f"`{method}`, {setting}" if setting else f"`{method}`"
        lines.append(f"| {name} | {' | '.join(scores[keep] for keep in budgets)} |")
    return lines


def measured_table(runs: list[dict[str, list[dict[str, str]]]]) -> list[str]:
    """Return a few of the GPU runs: prefill in ms, speed-up by method with its limit, and KV cache."""
    lines = [
        "| model, visual tokens | prompts | prefill, plain | `visionzip` (limit) | `fastv` (limit) | KV cache, plain |"
        " `visionzip` |",
        "| --- " * 7 + "|",
    ]
    for run in runs:
        plain, visionzip, fastv = (run[method][0] for method in ("no_compression", "visionzip", "fastv"))
        if plain["attention"] != "sdpa" or plain["preset"] not in MEASURED or plain["batch"] == "32":
            continue
        speed = " | ".join(f"{float(r['speed_up']):.1f}x ({float(r['flops_limit']):.1f}x)" for r in (visionzip, fastv))
        memory = " | ".join(f"{int(row['kv_bytes']) / MIB:,.0f} MiB" for row in (plain, visionzip))
        lines.append(
            f"| {MEASURED[plain['preset']]} | {plain['batch']} | {float(plain['ms']):.0f} ms | {speed} | {memory} |"
        )
    return lines


def models_table(models: list[Checked]) -> list[str]:
    """Return a row for each group of models that work with the same methods, the most methods first.

    A row names the well-known models and counts the others.
    """
    columns = {"pooling, clustering, random": "kmeans", "VisionZip": "visionzip", "inside the LLM": "fastv"}
    groups: dict[tuple[bool, ...], list[str]] = {}
    for model in models:
        if model.status == "works":
            works = tuple(model.status_of(method) == "works" for method in columns.values())
            groups.setdefault(works, []).append(model.folder)
    lines = [f"| models | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    for works in sorted(groups, key=sum, reverse=True):
        known = [name for folder, name in KNOWN.items() if folder in groups[works]]
        others = len(groups[works]) - len(known)
        listed = [*known, f"{others} more"] if others else known
        lines.append(f"| {', '.join(listed)} | {' | '.join('✓' if it else '–' for it in works)} |")
    return lines


def video_table(rows: list[dict[str, str]]) -> list[str]:
    """Return models and methods down: whole runs on the longest video, and the share of the selection by frames."""
    frames = sorted({int(row["frames"]) for row in rows})
    longest = str(frames[-1])
    head = ["model", "method", f"tokens of {longest} frames", "time (quartiles)", "peak memory"]
    head += [f"selection, {count} frames" for count in frames]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for model, method in dict.fromkeys((row["model"], row["method"]) for row in rows):
        of_method = {row["frames"]: row for row in rows if (row["model"], row["method"]) == (model, method)}
        last = of_method[longest]
        cells = [f"`{model}`", f"`{method}`", last["tokens_after"]]
        cells.append(f"{float(last['time_ratio']):.2f}x ({ends(last, 'time_ratio')})")
        cells.append(f"{float(last['memory_ratio']):.2f}x ({float(last['peak_mib']):.0f} MiB)")
        if method == "plain":
            cells[1] = "plain encoder"
            cells += [f"{float(of_method[str(count)]['median_ms']):.0f} ms" for count in frames]
        else:
            cells += [f"{float(of_method[str(count)]['selection_over_encoder']):.1%}" for count in frames]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def methods_cost_table(rows: list[dict[str, str]]) -> list[str]:
    """Return variants of methods down, sizes across: time relative to the encoder's for the same input, and memory.

    The last column is the power of the tokens with which time and memory grow between the two largest sizes, unless
    they are below 1 ms and 1 MiB.
    """
    sizes = sorted({int(row["tokens"]) for row in rows})
    head = ["method", "keep", *(f"{size:,}" for size in sizes), "grows with tokens to the power"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for method, setting, keep in dict.fromkeys((row["method"], row["setting"], row["keep"]) for row in rows):
        of = {int(r["tokens"]): r for r in rows if (r["method"], r["setting"], r["keep"]) == (method, setting, keep)}
        name = method if method.startswith("signal") else f"`{method}({', '.join(setting.split())})`"
        cells = [name.replace("()", ""), keep, *(cost_cell(of.get(size)) for size in sizes)]
        before, after = (of.get(size, {}) for size in sizes[-2:])
        powers = " / ".join(power(before, after, what) for what in ("milliseconds", "peak_mib"))
        lines.append(f"| {' | '.join(cells)} | {powers if before and after else ''} |")
    return lines


def power(before: dict[str, str], after: dict[str, str], what: str) -> str:
    """Return the power of the tokens with which a value grows between two rows, for values of at least 1."""
    values = [float(row.get(what) or 0) for row in (before, after)]
    if min(values) < 1:
        return NOTHING
    return f"{log(values[1] / values[0]) / log(int(after['tokens']) / int(before['tokens'])):.1f}"


def cost_cell(row: dict[str, str] | None) -> str:
    """Return the time, as a share of the encoder's for the same input, and the peak memory."""
    if row is None or not row["milliseconds"]:
        return row["note"] if row else ""
    return f"{float(row['time_over_encoder_of_input']):.2%} / {float(row['peak_mib']):,.0f} MiB"


def vllm_table(rows: list[dict[str, str]]) -> list[str]:
    """Return methods in vLLM down, concurrency across: requests/s and time to the first token, relative to vLLM's own.

    Brackets have the share of the FLOPs limit.
    """
    rows = [row for row in rows if row["method"] != STOCK]
    levels = list(dict.fromkeys(row["concurrency"] for row in rows))
    head = ["method", *(f"requests/s at {level}" for level in levels), *(f"first token at {level}" for level in levels)]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        of = {row["concurrency"]: row for row in rows if row["method"] == method}
        cells = [f"{float(of[n]['ratio']):.1f}x ({float(of[n]['share_of_limit']):.0%})" for n in levels]
        cells += [f"{float(of[n]['ttft_ratio']):.1f}x sooner" for n in levels]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return lines


def vllm_kv_table(rows: list[dict[str, str]]) -> list[str]:
    """Return methods and lengths of answers down, concurrency across: the peak KV cache, relative to vLLM's own."""
    levels = list(dict.fromkeys(row["concurrency"] for row in rows))
    peaks = {(row["method"], row["new_tokens"], row["concurrency"]): int(row["peak_kv_tokens"]) for row in rows}
    head = ["method", "tokens of an answer", *(f"KV cache at {level}" for level in levels)]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for method, length in dict.fromkeys((method, length) for method, length, _ in peaks if method != STOCK):
        cells = [f"{peaks[method, length, level] / peaks[STOCK, length, level]:.2f}x" for level in levels]
        lines.append(f"| `{method}` | {length} | {' | '.join(cells)} |")
    return lines


#: The parts of a request to vLLM, with the columns that have their times.
VLLM_PARTS = {
    "image to pixels": "pixels_ms",
    "vision encoder": "encoder_ms",
    "compression": "compression_ms",
    "projector": "projector_ms",
    "LLM": "llm_ms",
    "rest": "rest_ms",
}


def vllm_parts_table(rows: list[dict[str, str]]) -> list[str]:
    """Return methods in vLLM down, the parts of a request across, at the lowest and the highest concurrency."""
    levels = list(dict.fromkeys(row["concurrency"] for row in rows))
    head = ["method", "concurrency", *VLLM_PARTS, "together"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for row in rows:
        if row["concurrency"] in (levels[0], levels[-1]):
            times = [float(row[column]) for column in VLLM_PARTS.values()]
            cells = [*(f"{time:.1f}" for time in times), f"{sum(times):.0f}"]
            method = "no compressor" if row["method"] == STOCK else f"`{row['method']}`"
            lines.append(f"| {method} | {row['concurrency']} | {' | '.join(cells)} |")
    return lines


def ends(row: dict[str, str], name: str) -> str:
    return f"{float(row[f'{name}_q1']):.2f} to {float(row[f'{name}_q3']):.2f}"


def named(row: dict[str, str]) -> str:
    """Return the first two cells of a run, with the attention if it is not SDPA."""
    attention = "" if row["attention"] == "sdpa" else f", {row['attention']}"
    return f"`{row['preset']}`{attention} | {row['batch']}"


def bench_runs(folder: Path, device: str) -> list[dict[str, list[dict[str, str]]]]:
    """Return rows by method of every full-width run of `vlmzip bench` on a device.

    Smaller models come first, then fewer tokens and smaller batches.
    """
    runs = []
    for rows in map(read, folder.glob(f"bench-*-{device}-*-scale1-*.csv")):
        run: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            run.setdefault(row["method"], []).append(row)
        runs.append(run)
    order = ("layers", "visual_tokens_before", "batch")
    return sorted(runs, key=lambda run: (run[PLAIN][0]["attention"] != "sdpa", *(int(run[PLAIN][0][n]) for n in order)))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def tables(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Return the lines of every table, by page and by the name in its comments."""
    runs = bench_runs(folder, GPU)
    costs = [read(path) for path in folder.glob(f"selection-cost-{GPU}-*.csv")]
    (videos,) = [read(path) for path in folder.glob("video-cost-*.csv")]
    gpu = {
        "selection on a GPU": selection_table(costs),
        "prefill on a GPU": speed_table(runs, "LLM prefill"),
        "first token on a GPU": speed_table(runs, "TTFT"),
        "memory on a GPU": memory_table(runs),
    }
    readme = {
        "published": published_table(read(PAPERS / "visionzip_table_01.csv")),
        "measured": measured_table(runs),
        "models": models_table(models_of(committed())),
        "methods": methods_table(),
    }
    study = study_table(read(folder / "mini-study.csv"))
    results = {"results": study, "selection on videos": video_table(videos), **gpu}
    results["every method on mini"] = every_method_table(read(folder / "methods-on-mini.csv"))
    results["selection of each method"] = methods_cost_table(read(folder / "selection-by-method.csv"))
    results["full width on a CPU"] = cpu_table(bench_runs(folder, CPU))
    pages = {"README.md": readme, "docs/results.md": results}
    if stores := [row for path in sorted(folder.glob("store-*.csv")) for row in read(path)]:
        pages["docs/store.md"] = {"store": store_table(stores)}
    if in_vllm := [row for path in sorted(folder.glob("vllm-speed-*.csv")) for row in read(path)]:
        prefills = [row for row in in_vllm if row["new_tokens"] == "1"]
        pages["docs/vllm.md"] = {
            "speed in vLLM": vllm_table(prefills),
            "KV cache in vLLM": vllm_kv_table(in_vllm),
            "parts in vLLM": vllm_parts_table(prefills),
        }
    return pages


def replaced(text: str, name: str, lines: list[str]) -> str:
    """Replace the text between two comments. Raise `ValueError` unless each appears exactly once."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"there should be one {begin.strip()} and one {end} after it")
    before, rest = text.split(begin)
    return before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page differs")
    check = parser.parse_args(arguments).check
    code = 0
    for page, wanted in tables(root / "benchmarks" / "results").items():
        path = root / page
        now = then = path.read_text(encoding="utf-8")
        for name, lines in wanted.items():
            then = replaced(then, name, lines)
        if not check:
            path.write_text(then, encoding="utf-8")
        elif now != then:
            print(
                "\n".join(difflib.unified_diff(now.splitlines(), then.splitlines(), page, "the results", lineterm=""))
            )
            print(f"{page} differs from the committed results: python docs/_make/tables.py", file=sys.stderr)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
