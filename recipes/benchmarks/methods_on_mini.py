"""Run every method on mini's test split at five budgets: accuracy, costs, and the simplest methods that it beats.

    python -m recipes.benchmarks.methods_on_mini                  # all 3,414 questions
    python -m recipes.benchmarks.methods_on_mini --limit 684
    python -m recipes.benchmarks.methods_on_mini --limit 684 --budgets 75%,25% --out a.csv   # beside another process

Budgets are fractions of the visual tokens, averaged over all LLM layers. A method that cannot meet a budget has a row
with the reason. Methods with a threshold, such as DFMR, are calibrated on mini's validation images. Each configuration
is written to benchmarks/results/methods-on-mini.csv when it is done. A second run resumes a stopped one, and measures
rows of other code, weights or versions of torch and transformers again. docs/_make/tables.py writes the table. mini is
a test bed: the best method here may not be the best one on a model with seven billion parameters.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

import vlmzip
from recipes.benchmarks import RESULTS
from recipes.mini import evaluate
from recipes.mini.evaluate import AnswerRecord, ModelAnswer, by, share_right
from vlmzip import KMeans, LLaVolta, NoCompression, RandomTokens, Site, VisionZip, catalogue
from vlmzip.compressor import BudgetError, Calibratable, Compressor, Profile
from vlmzip.files import write_csv
from vlmzip.lab.machine import about
from vlmzip.mini import load
from vlmzip.mini.assets import shipped_assets
from vlmzip.mini.drawing import draw
from vlmzip.mini.scene import make_scene
from vlmzip.mini.splits import VALIDATION, test_split
from vlmzip.models import family_of
from vlmzip.runtime.calibration import MeasuredImage, measure, meet
from vlmzip.runtime.fingerprint import of_code, of_files, of_json, of_model
from vlmzip.runtime.flops import prefill_flops

BUDGETS = ("75%", "50%", "25%", "11%", "5.6%")
#: Settings to run in addition to the methods' defaults.
VARIANTS = [
    VisionZip(merge="mean"),
    RandomTokens(site=Site.IN_LLM, layer=1),
    KMeans(site=Site.POST_PROJECTOR),
    LLaVolta(layer=1),
    LLaVolta(layer=-1),
]
BATCH = 57


@cache
def mini() -> tuple[nn.Module, Any]:
    return load()


def settings() -> Iterator[Compressor]:
    """Return every method with its defaults. Methods before the LLM are also run with original positions."""
    for cls in catalogue.available().values():
        if cls is NoCompression or cls.trained_weights or cls.videos_only:
            continue
        if cls.drops_patches:  # mini's encoder takes whole images
            continue
        method = catalogue.make(cls, {})
        yield method
        if not method.layers and method.default_positions is None:
            yield replace(method, positions="original")
    yield from VARIANTS


def at_budget(
    method: Compressor, budget: str, profile: Profile, measured: dict[Compressor, list[MeasuredImage]]
) -> Compressor:
    if not isinstance(method, Calibratable):
        return method.at_budget(budget, profile)[0]
    alike = replace(method, positions=None)  # positions change nothing about what is measured
    if alike not in measured:
        images = [Image.fromarray(draw(make_scene(seed), shipped_assets("validation"))) for seed in VALIDATION]
        measured[alike] = measure(mini()[0], images, alike, processor=mini()[1])
    return replace(meet(alike, measured[alike], budget).compressor, positions=method.positions)


def ask(compressed: nn.Module, limit: int | None) -> tuple[list[AnswerRecord], list[float], float, float]:
    """Return answers, mean visual tokens by layer, milliseconds of selection per image, and total seconds."""
    answer, samples = ModelAnswer(compressed, mini()[1]), test_split(limit)
    records, layers, milliseconds, start = [], [], 0.0, time.perf_counter()
    for first in range(0, len(samples), BATCH):
        some = samples[first : first + BATCH]
        texts = answer([sample.image for sample in some], [sample.question for sample in some])
        records += [
            AnswerRecord(s.seed, s.question, s.answer, t, s.type, s.level) for s, t in zip(some, texts, strict=True)
        ]
        layers.append(compressed.report.by_layer)
        milliseconds += compressed.report.milliseconds["selection"]
    mean = [sum(counts) / len(samples) for counts in zip(*layers, strict=True)]
    return records, mean, milliseconds / len(samples), time.perf_counter() - start


@cache
def fingerprint() -> str:
    """Return a digest of what answers depend on in addition to the compressor's settings: code, weights, versions."""
    scripts = of_files([Path(__file__), Path(evaluate.__file__)])
    return of_json([of_model(*mini()), of_code("mini"), scripts])


def row_of(budget: str, setting: str, method: Compressor, limit: int | None) -> dict[str, object]:
    model, processor = mini()
    compressed = vlmzip.attach(model, method)
    records, tokens, milliseconds, seconds = ask(compressed, limit)
    family, right = family_of(model), share_right(records)
    text = len(processor.tokenizer("USER: \nwhat color is the ring ? ASSISTANT:").input_ids)
    whole = family.profile().size
    flops = prefill_flops(family, [text + count for count in tokens])
    return {
        "budget": budget,
        "method": method.name(),
        "setting": setting,
        "positions": positions_of(method),
        "reached": f"{sum(tokens) / (len(tokens) * whole):.4f}",
        "tokens_first_layer": f"{tokens[0]:.1f}",
        "tokens_last_layer": f"{tokens[-1]:.1f}",
        "prefill_flops_share": f"{flops / prefill_flops(family, text + whole):.4f}",
        "selection_ms": f"{milliseconds:.3f}",
        "accuracy": f"{100 * right:.2f}",
        "standard_error": f"{100 * math.sqrt(right * (1 - right) / len(records)):.2f}",
        **{f"type_{name}": f"{100 * share:.1f}" for name, share in by(records, "type").items()},
        **{f"level_{name}": f"{100 * share:.1f}" for name, share in by(records, "level").items()},
        "questions": len(records),
        "seconds": f"{seconds:.0f}",
        "right": "".join("01"[record.right] for record in records),
        "compressor": str(method.to_dict()),
        "fingerprint": fingerprint(),
        **about(),
    }


def setting_of(method: Compressor) -> str:
    """Return the settings that differ from the method's defaults, before fitting to a budget, without positions."""
    usual = catalogue.make(type(method), {})
    names = [name for name in method.field_names() if name != "positions"]
    told = [f"{name}={value}" for name in names if (value := getattr(method, name)) != getattr(usual, name)]
    return " ".join(told)


def save(rows: list[dict[str, object]], path: Path) -> None:
    rows.sort(key=lambda row: ("100%", *BUDGETS).index(str(row["budget"])))
    names = max(rows, key=len)  # a method that has no such budget has fewer columns
    write_csv(path, [{name: row.get(name, "") for name in names} for row in rows])


def cannot(budget: str, method: Compressor, error: BudgetError) -> dict[str, object]:
    """Return the row of a method that cannot meet the budget, with the reason instead of the compressor."""
    own = {"budget": budget, "method": method.name(), "setting": setting_of(method)}
    return {**own, "positions": positions_of(method), "questions": 0, "compressor": str(error)}


def is_row_of(row: dict[str, object], budget: str, method: Compressor) -> bool:
    asked = (budget, method.name(), setting_of(method), positions_of(method))
    return (row["budget"], row["method"], row["setting"], row["positions"]) == asked


def is_measured(row: dict[str, object], method: Compressor, questions: int) -> bool:
    """Return whether a row has the method's answers at this budget to this many questions, by the current code."""
    wanted = {"compressor": str(method.to_dict()), "questions": str(questions), "fingerprint": fingerprint()}
    return all(str(row.get(name)) == value for name, value in wanted.items())


def positions_of(method: Compressor) -> str:
    own = method.positions or method.stages()[0].default_positions or "contiguous"
    return "original" if method.stages()[0].layers else own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, help="ask only the first questions")
    parser.add_argument("--budgets", type=lambda text: text.split(","), default=BUDGETS, help="some of the budgets")
    parser.add_argument("--out", type=Path, default=RESULTS / "methods-on-mini.csv")
    args = parser.parse_args()
    rows: list[dict[str, object]] = list(csv.DictReader(args.out.open())) if args.out.exists() else []
    profile, measured = family_of(mini()[0]).profile(), {}
    count = min(args.limit or 10**9, len(test_split()))
    for budget, method in [("100%", NoCompression()), *((b, m) for b in args.budgets for m in settings())]:
        others = [row for row in rows if not is_row_of(row, budget, method)]
        try:
            chosen = method if budget == "100%" else at_budget(method, budget, profile, measured)
        except BudgetError as error:
            rows = [*others, cannot(budget, method, error)]
            continue
        if any(is_measured(row, chosen, count) for row in rows if is_row_of(row, budget, method)):
            continue
        rows = [*others, row_of(budget, setting_of(method), chosen, args.limit)]
        save(rows, args.out)
        print(f"{budget:>5} {method.name():<18}{rows[-1]['positions']!s:<11} {rows[-1]['accuracy']} %", flush=True)
    save(rows, args.out)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
