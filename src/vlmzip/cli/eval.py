"""`vlmzip eval`: what methods lose and gain at several budgets, on mini's questions, easy-VQA or yours."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vlmzip.cli import suite
from vlmzip.cli.options import add_model, check_counts, check_folder
from vlmzip.errors import UserError
from vlmzip.lab.papers import published
from vlmzip.lab.tasks.catalogue import FORMS as TASKS
from vlmzip.outline import METHOD_FORMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlmzip.lab.results import Result
    from vlmzip.lab.study import Study
    from vlmzip.lab.tasks.task import Task

DEFAULT_TASKS = "mini"
REPORT = "report.html"
EXAMPLES = """  vlmzip eval --limit 300 --methods visionzip,pool2d --keep 25%,11% --report
  vlmzip eval --tasks mini,easy-vqa --keep 75%,50%,25%,11%,5.6% --out runs/eval/all
  vlmzip eval --model llava-hf/llava-1.5-7b-hf --tasks my_questions:vqa --calibrate-on other_photos --keep 192,64
  vlmzip eval --methods "dfmr(tau=0.3),tuned/compressor.json" --keep as-set
  vlmzip eval --tasks gqa:exact --model llava-hf/llava-1.5-7b-hf --methods visionzip --keep 64 --against visionzip
  vlmzip eval --suite llavolta13 --model llava-hf/llava-1.5-7b-hf --methods visionzip --keep 64
  accelerate launch --multi_gpu --num_processes 4 -m vlmzip.cli.main eval --model llava-hf/llava-1.5-7b-hf …

Run the same command again to go on where it was stopped: nothing is asked twice."""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    add_model(parser)
    parser.add_argument(
        "--methods",
        metavar="A,B,…",
        help=f"separated by commas, each {METHOD_FORMS}; default: all that need no training",
    )
    parser.add_argument(
        "--keep",
        default="75%,50%,25%,11%",
        metavar="K,K,…",
        help="average budgets, tokens per image or shares of them, or as-set: methods as they are written;"
        " default: 75%%,50%%,25%%,11%%",
    )
    parser.add_argument("--tasks", metavar="T,T,…", help=f"{TASKS}; default: {DEFAULT_TASKS}")
    parser.add_argument("--limit", type=int, metavar="N", help="ask only the first questions of each task")
    parser.add_argument(
        "--calibrate-on", metavar="FOLDER", help="images for the thresholds of methods that decide by content"
    )
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="questions at a time; default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="length of answers; default: the task's")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where results go; default: runs/eval/MODEL; answers are kept, curves and tables are the last run's",
    )
    parser.add_argument("--report", action="store_true", help="write report.html, with images whose answers changed")
    parser.add_argument(
        "--examples", type=int, default=4, metavar="N", help="images for each row of the report; default: %(default)s"
    )
    parser.add_argument(
        "--against",
        metavar="PAPER",
        help="print a paper's numbers for the same model, method and budget, and the difference",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the intervals and of the report's choice of images"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    suite.add_arguments(parser)


def run(args: Namespace) -> None:
    from dataclasses import replace

    from vlmzip.cli.loading import load, note_unknown_words, tell
    from vlmzip.lab.configurations import read_rows
    from vlmzip.lab.study import Study
    from vlmzip.lab.tasks.catalogue import read_tasks
    from vlmzip.processes import Processes

    _check(args)
    if args.suite is not None:
        suite.run(args)
        return
    methods, budgets = read_rows(args.methods, args.keep)
    tasks = read_tasks(DEFAULT_TASKS if args.tasks is None else args.tasks, args.limit, args.calibrate_on)
    if args.max_new_tokens is not None:
        tasks = [replace(task, max_new_tokens=args.max_new_tokens) for task in tasks]
    folder = args.out or Path("runs", "eval", Path(args.model).name)
    with Processes() as processes:
        loaded = load(args.model, processes.device(args.device), args.dtype, allow_pickle=args.allow_pickle)
        for task in tasks if processes.first else []:
            note_unknown_words(loaded, task)
        study = Study(loaded.model, loaded.processor, args.model, folder, args.batch, processes, tell)
        configurations = study.configure(tasks, methods, budgets)
        study.run(tasks, configurations)
        if not processes.first:
            return
        from vlmzip.lab.results import results

        found = [(task, list(results(study, task, configurations, args.seed))) for task in tasks]
        try:
            _write(study, found, args)
        finally:  # a full disk must not cost the table
            _print(folder, args, found)
    if study.failures:
        tell(f"{len(study.failures)} configurations broke; see the notes above")
        sys.exit(1)


def _check(args: Namespace) -> None:
    """Raises `UserError` for what can be refused before anything slow happens."""
    check_counts(args, "limit", "batch", "max_new_tokens")
    check_counts(args, "examples", "seed", least=0)
    check_folder(args)
    if args.against is not None:
        published(args.against)
    suite.check(args)


def _write(study: Study, found: list[tuple[Task, list[Result]]], args: Namespace) -> None:
    """The table as CSV, the curves, and the report if it is wanted."""
    from vlmzip.cli.loading import note
    from vlmzip.lab.results import write_table

    write_table(study.folder / "results.csv", [result for _, of_task in found for result in of_task])
    figures = [_curves(study, task, of_task) for task, of_task in found]
    if args.report:
        _write_report(study, found, figures, args)
    elif (study.folder / REPORT).exists():
        note(f"{study.folder / REPORT} is an earlier run's; --report makes it anew")


def _curves(study: Study, task: Task, found: list[Result]) -> list[Figure]:
    from vlmzip.cli.loading import note
    from vlmzip.lab.curves import COSTS, draw_curve, save_figure
    from vlmzip.lab.study import slug
    from vlmzip.visualize.figure import import_matplotlib

    try:
        import_matplotlib()
    except UserError as error:
        note(f"there are no curves: {error}")
        return []
    figures = []
    for cost in COSTS:
        title = f"{study.name} on {task.name}, {len(task.samples):,} questions"
        figures.append(draw_curve(found, cost, title))
        save_figure(figures[-1], study.folder / f"{slug(task.name)}-{cost}.png")
    return figures


def _write_report(
    study: Study, found: list[tuple[Task, list[Result]]], figures: list[list[Figure]], args: Namespace
) -> None:
    from vlmzip.cli.loading import progress
    from vlmzip.files import write_text
    from vlmzip.lab.examples import examples
    from vlmzip.lab.report import Chapter, notes, render_report

    chapters = []
    with progress("drawing what was dropped"):
        for (task, of_task), curves in zip(found, figures, strict=True):
            changed = [result for result in of_task if result.changed]
            some = [(one, examples(study, task, of_task[0], one, args.examples, args.seed)) for one in changed]
            chapters.append(Chapter(task, of_task, curves, some))
    conditions = study.conditions
    facts = [f"{conditions['model']}, {conditions['dtype']}", conditions["device"], f"vlmzip {conditions['vlmzip']}"]
    facts += [f"commit {conditions['commit']}", f"torch {conditions['torch']}"]
    facts += [f"transformers {conditions['transformers']}"]
    text = render_report(f"Visual token compression of {study.name}", facts, chapters, notes(args.seed))
    write_text(study.folder / REPORT, text)


def _print(folder: Path, args: Namespace, found: list[tuple[Task, list[Result]]]) -> None:
    from vlmzip.cli.tables import print_table
    from vlmzip.lab import results
    from vlmzip.lab.papers import against, show
    from vlmzip.lab.report import SHORT_COLUMNS, notes, reasons, short_cells, size

    ran = [result for _, of_task in found for result in of_task if result.score is not None]
    beside = against(args.against, [results.measured(result, args.model) for result in ran]) if args.against else []
    if args.json:
        rows = [results.as_json(result) for _, of_task in found for result in of_task]
        content = {"model": args.model, "out": str(folder), "rows": rows}
        print(json.dumps(content | ({"against": list(map(asdict, beside))} if beside else {}), indent=2))
        return
    for task, of_task in found:
        print(f"{task.name}: {task.about}; {task.metric.about}; {size(task)}\n")
        print_table([*SHORT_COLUMNS, *task.metric.shares], [short_cells(result) for result in of_task])
        print("".join(f"\n{reason}" for reason in reasons(of_task)) + "\n")
    print("\n".join(notes(args.seed)))
    if beside:
        print(f"\n{show(beside)}")
    print(f"written to {folder}")
