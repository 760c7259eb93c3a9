"""`vlmzip eval`: measure what methods lose and gain at several budgets, on built-in tasks or your questions."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlmzip.cli._options.common import check_counts, check_folder
from vlmzip.cli._options.eval import DEFAULT_TASKS
from vlmzip.cli._shared import suite
from vlmzip.cli._shared.console import spinner
from vlmzip.cli._shared.loading import load
from vlmzip.errors import UserError
from vlmzip.files import write_text
from vlmzip.lab import results
from vlmzip.lab.budgets import read_rows
from vlmzip.lab.curves import COSTS, TITLES, draw_curve, plot_title, save_figure
from vlmzip.lab.examples import examples
from vlmzip.lab.names import slug
from vlmzip.lab.papers import against, published, show
from vlmzip.lab.report import Chapter, notes, reasons, render_report, size
from vlmzip.lab.results import Result
from vlmzip.lab.study import Study
from vlmzip.lab.table import print_json
from vlmzip.lab.tasks.catalogue import read_tasks
from vlmzip.lab.tasks.task import Task
from vlmzip.lab.tasks.words import warn_of_unknown_words
from vlmzip.processes import Processes
from vlmzip.visualize.figure import import_matplotlib

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


REPORT = "report.html"


def run(args: Namespace) -> None:
    _check(args)
    if args.suite is not None:
        suite.run(args)
        return
    methods, budgets = read_rows(args.methods, args.average_keep, args.keep)
    tasks = read_tasks(DEFAULT_TASKS if args.tasks is None else args.tasks, args.limit, args.calibrate_on)
    if args.max_new_tokens is not None:
        tasks = [replace(task, max_new_tokens=args.max_new_tokens) for task in tasks]
    folder = args.out or Path("runs", "eval", Path(args.model).name)
    with Processes() as processes:
        loaded = load(args.model, processes.device(args.device), args.dtype, allow_pickle=args.allow_pickle)
        for task in tasks if processes.first else []:
            warn_of_unknown_words(loaded, task)
        study = Study(loaded.model, loaded.processor, args.model, folder, args.batch, processes)
        configurations = study.configure(tasks, methods, budgets)
        study.run(tasks, configurations)
        if not processes.first:
            return

        by_task = [(task, list(results.results(study, task, configurations, args.seed))) for task in tasks]
        try:
            _write(study, by_task, args)
        finally:  # print the table even if the disk is full
            _print(folder, args, by_task)
    if study.failures:
        log.info(f"{len(study.failures)} configurations broke; see the notes above")
        sys.exit(1)


def _check(args: Namespace) -> None:
    """Raise `UserError` for invalid options before the model is loaded."""
    check_counts(args, "limit", "batch", "max_new_tokens")
    check_counts(args, "examples", "seed", least=0)
    check_folder(args)
    if args.against is not None:
        published(args.against)
    suite.check(args)


def _write(study: Study, by_task: list[tuple[Task, list[Result]]], args: Namespace) -> None:
    """Write the table as CSV, the curves and, with --report, the report."""
    results.table([result for _, of_task in by_task for result in of_task]).write_csv(study.folder / "results.csv")
    figures = [_curves(study, task, of_task) for task, of_task in by_task]
    if args.report:
        _write_report(study, by_task, figures, args)
    elif (study.folder / REPORT).exists():
        log.warning(f"{study.folder / REPORT} is from an earlier run; give --report to write it again")


def _curves(study: Study, task: Task, of_task: list[Result]) -> list[Figure]:
    try:
        import_matplotlib()
    except UserError as error:
        log.warning(f"no curves are drawn: {error}")
        return []
    figures = []
    for cost in COSTS:
        figures.append(draw_curve(of_task, cost, plot_title(TITLES[cost], study.name, task)))
        save_figure(figures[-1], study.folder / f"{slug(task.name)}-{cost}.png")
    return figures


def _write_report(
    study: Study, by_task: list[tuple[Task, list[Result]]], figures: list[list[Figure]], args: Namespace
) -> None:
    chapters = []
    with spinner("drawing what was dropped"):
        for (task, of_task), curves in zip(by_task, figures, strict=True):
            changed = [result for result in of_task if result.changed]
            chosen = [
                (result, examples(study, task, of_task[0], result, args.examples, args.seed)) for result in changed
            ]
            chapters.append(Chapter(task, of_task, curves, chosen))
    conditions = study.conditions
    facts = [f"{conditions['model']}, {conditions['dtype']}", conditions["device"], f"vlmzip {conditions['vlmzip']}"]
    facts += [f"commit {conditions['commit']}", f"torch {conditions['torch']}"]
    facts += [f"transformers {conditions['transformers']}"]
    text = render_report(f"Visual token compression of {study.name}", facts, chapters, notes(args.seed))
    write_text(study.folder / REPORT, text)


def _print(folder: Path, args: Namespace, by_task: list[tuple[Task, list[Result]]]) -> None:
    ran = [result for _, of_task in by_task for result in of_task if result.score is not None]
    beside = against(args.against, [results.measured(result, args.model) for result in ran]) if args.against else []
    if args.json:
        rows = results.table([result for _, of_task in by_task for result in of_task]).as_json()
        content = {"model": args.model, "out": str(folder), "rows": rows}
        print_json(content | ({"against": list(map(asdict, beside))} if beside else {}))
        return
    for task, of_task in by_task:
        print(f"{task.name}: {task.about}; {task.metric.about}; {size(task)}\n")
        results.table(of_task).print()
        print("".join(f"\n{reason}" for reason in reasons(of_task)) + "\n")
    print("\n".join(notes(args.seed)))
    if beside:
        print(f"\n{show(beside)}")
    print(f"written to {folder}")
