"""`vlmzip models`: list the models of transformers, and what works with each of them."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vlmzip import outline
from vlmzip.errors import ADD_A_FAMILY, UserError, did_you_mean
from vlmzip.lab.conformance import results as conformance
from vlmzip.lab.conformance.results import Checked
from vlmzip.lab.table import Column, Table, print_json


def run(args: Namespace) -> None:
    if args.out and not args.check:
        raise UserError("--out belongs to --check")
    if args.jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {args.jobs}")
    results = _check(args) if args.check else conformance.committed()
    models = conformance.models_of(results)
    if args.name:
        by_folder = {model.folder: model for model in models}
        _refuse_unknown(args.name, list(by_folder))
        models = [by_folder[name] for name in args.name]
    if args.json:
        print_json([asdict(model) for model in models])
        return
    if args.name:
        for model in models:
            _print_methods(model)
    else:
        _overview(models).print()
        print("\n" + ", ".join(f"{count} {status}" for status, count in conformance.counts(models).items()))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    print(f"\nTried on tiny models with random weights ({versions}).")
    print("in_llm: not in LLMs with sliding windows (PaliGemma 2), linear attention or convolutions.")
    print(f"A model without a row, or a refused one: {ADD_A_FAMILY}.")
    print("The model mini_gemini is part of vlmzip: `vlmzip convert` makes its checkpoints.")
    print("mini, the small model that ships with vlmzip, is a llava; --model takes any checkpoint of these models.")


def _check(args: Namespace) -> conformance.Results:
    # They import torch and transformers, which the committed results do not need.
    from vlmzip.lab.conformance import run, tiny

    known = tiny.folders()
    _refuse_unknown(args.name, known)
    results = run.check_all(args.name or known, args.jobs, _report)
    if args.out:
        conformance.write(Path(args.out), results)
        print(f"results written to {args.out}", file=sys.stderr)
    return results


def _refuse_unknown(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"unknown model {name!r}{did_you_mean(name, known) or '; `vlmzip models` lists all'}")


def _report(model: Checked) -> None:
    print(f"{model.folder}: {_summary(model)}", file=sys.stderr)


def _summary(model: Checked) -> str:
    """Return the number of methods of each status, or the reason why none was tried."""
    if model.untried:
        return f"{model.untried}: {model.reason}"
    statuses = [model.status_of(method) for method in model.cells]
    words = {"works": "methods work", "refused": "refused", "fails": "fail"}
    return ", ".join(f"{statuses.count(status)} {word}" for status, word in words.items() if status in statuses)


def _overview(models: Sequence[Checked]) -> Table[Checked]:
    """Return a table with a row for each model."""
    columns = [
        Column[Checked](lambda model: model.folder, "model"),
        Column[Checked](lambda model: model.family, "family", text=lambda family: family or "—"),
        Column[Checked](_summary, "what works"),
    ]
    return Table(columns, models)


def _print_methods(model: Checked) -> None:
    """Print the status of each method with one model, and the reason if it does not work."""
    print(f"{model.folder} ({model.model or 'no class that answers'}){_example(model)}")
    if model.untried:
        print(f"  {model.untried}: {model.reason}")
    for method, modes in model.cells.items():
        by_result: dict[tuple[str, str], list[str]] = {}
        for mode, (status, reason) in modes.items():
            by_result.setdefault((status, reason), []).append(mode)
        for (status, reason), where in by_result.items():
            text = status if len(by_result) == 1 else f"{status} ({', '.join(where)})"
            print(f"  {method:20}{text}" + (f": {reason}" if reason else ""))
    status, reason = model.video
    if status:
        print(f"  {'a video':20}{status}" + (f": {reason}" if reason else ""))


def _example(model: Checked) -> str:
    """Return the example of a family with a file, such as ", for example llava-hf/llava-1.5-7b-hf"."""
    examples = {family.name: family.values["example"] for family in outline.families()}
    return f", for example {examples[model.family]}" if model.family in examples else ""
