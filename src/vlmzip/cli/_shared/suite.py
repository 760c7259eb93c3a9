"""`vlmzip eval --suite`: run public benchmarks with lmms-eval, with and without compression."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

from vlmzip.cli._shared.loading import load
from vlmzip.errors import UserError
from vlmzip.files import is_folder
from vlmzip.lab.budgets import read_rows
from vlmzip.lab.lmms.requests import AnswerFailed
from vlmzip.lab.lmms.run import SuiteRun, import_lmms_eval
from vlmzip.lab.lmms.scores import ConfigurationScores, measured, suite_scores, table
from vlmzip.lab.lmms.suites import Suite, read_suite
from vlmzip.lab.names import slug
from vlmzip.lab.papers import against, show
from vlmzip.lab.table import print_json
from vlmzip.lab.tasks.folder import UNCALIBRATED, calibration_on
from vlmzip.processes import Processes

log = logging.getLogger(__name__)

#: Options of `eval` that do not go with --suite, and their defaults.
OTHERS = {"tasks": None, "report": False, "max_new_tokens": None, "examples": 4, "seed": 0}


def check(args: Namespace) -> None:
    """Raise `UserError` for options that do not combine."""
    if args.suite is None:
        if args.include_path is not None:
            raise UserError("--include-path is for --suite: name the tasks in that folder, --suite my_task")
        return
    for name, default in OTHERS.items():
        if getattr(args, name) != default:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is for vlmzip's own tasks and does not go with --suite; leave one of them out")
    if args.include_path is not None and not is_folder(args.include_path):
        raise UserError(f"--include-path {args.include_path!r} is not a folder")
    if Processes().count > 1:
        raise UserError("--suite runs in one process; for several: accelerate launch -m lmms_eval --model vlmzip …")


def run(args: Namespace) -> None:
    suite = read_suite(args.suite)
    methods, budgets = read_rows(args.methods, args.average_keep, args.keep)
    calibration = calibration_on(args.calibrate_on, []) if args.calibrate_on else None
    import_lmms_eval()
    folder = args.out or Path("runs", "lmms", Path(args.model).name)
    loaded = load(args.model, args.device, args.dtype, allow_pickle=args.allow_pickle)
    study = SuiteRun(loaded, suite, folder, args.batch, args.limit, args.include_path)
    configurations = study.configure(methods, budgets, calibration, UNCALIBRATED)
    try:
        study.run(configurations)
    except AnswerFailed as error:
        log.info(f"vlmzip: {error}; what is finished is kept in {folder}")
        sys.exit(1)
    scores = suite_scores(suite, configurations, study.result, study.left_out)
    try:
        table(suite, scores).write_csv(folder / f"{slug(suite.name)}.csv")
    finally:  # print the table even if the disk is full
        _print(suite, scores, folder, args)


def _print(suite: Suite, scores: list[ConfigurationScores], folder: Path, args: Namespace) -> None:
    mine = [score for of_one in scores for score in measured(suite, of_one, args.model)]
    beside = against(args.against, mine) if args.against else []
    if args.json:
        rows = table(suite, scores).as_json()
        content = {"model": args.model, "suite": suite.name, "out": str(folder), "rows": rows}
        print_json(content | ({"against": list(map(asdict, beside))} if beside else {}))
        return
    print(f"{suite.about}, by lmms-eval" + (f"; the first {args.limit:,} questions of each" if args.limit else ""))
    for of_one in scores:
        _print_scores(suite, of_one)
    notes = (f"{row.benchmark.name}: {row.note}" for of_one in scores for row in of_one.rows if row.note)
    for note in dict.fromkeys(notes):
        print(note)
    if beside:
        print(f"\n{show(beside)}\n")
    print(f"written to {folder}")


def _print_scores(suite: Suite, scores: ConfigurationScores) -> None:
    configuration = scores.configuration
    note = f": {configuration.note}" if configuration.note else ""
    print(f"\n{configuration.method} at {configuration.budget}{note}")
    if scores.rows:
        table(suite, [scores]).print()
        print()
