"""`vlmzip study`: the papers' analyses on any model, each a figure and a table."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from vlmzip.cli.options import add_model, check_counts, check_folder
from vlmzip.errors import UserError
from vlmzip.lab.analyses import NAMES, about, find
from vlmzip.lab.tasks.catalogue import FORMS as TASKS

if TYPE_CHECKING:
    from vlmzip.lab.analyses.subject import Row, Subject

EXAMPLES = """  vlmzip study tau --limit 300
  vlmzip study all --model llava-hf/llava-1.5-7b-hf --task my_questions:vqa --limit 500

Each writes NAME.csv, NAME.png and NAME.svg into --out. Run the same command again to go on where it was stopped."""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    names = parser.add_argument_group("analyses", "\n".join(f"{name:<20} {about(name)}" for name in NAMES))
    names.add_argument("names", nargs="+", metavar="NAME", help="analyses by name, or all")
    add_model(parser)
    parser.add_argument(
        "--task", "--tasks", dest="task", default="mini", metavar="T", help=f"{TASKS}; default: %(default)s"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="ask only the first questions of the task")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="questions at a time; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go; default: runs/study/MODEL")
    parser.add_argument("--seed", type=int, default=0, help="seed of the intervals and of every random draw")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> None:
    from vlmzip.cli.loading import load, note, note_unknown_words, tell
    from vlmzip.lab.analyses.subject import Subject, Unsuited
    from vlmzip.lab.tasks.catalogue import read_one_task
    from vlmzip.processes import Processes

    names = list(dict.fromkeys(NAMES if "all" in args.names else args.names))
    analyses = {name: find(name) for name in names}
    _check(args)
    task = read_one_task(args.task, args.limit, None)
    folder = args.out or Path("runs", "study", Path(args.model).name)
    found: dict[str, list[Row]] = {}
    with Processes() as processes:
        loaded = load(args.model, processes.device(args.device), args.dtype, allow_pickle=args.allow_pickle)
        if processes.first:
            note_unknown_words(loaded, task)
        subject = Subject(
            loaded.model, loaded.processor, args.model, task, folder, args.batch, args.seed, processes, tell
        )
        refused: list[Unsuited] = []
        for name, analysis in analyses.items():
            try:
                rows = analysis.measure(subject)
            except Unsuited as error:
                refused.append(error)
                if "all" not in args.names or len(refused) == len(analyses):
                    raise
                note(f"there is no {name}: {error}")
                continue
            if processes.first:
                found[name] = rows
                _write(subject, name, rows)
                if not args.json:
                    print("\n".join([f"{name}: {about(name)}", *analysis.findings(rows), ""]))
    if found and args.json:
        print(json.dumps({"model": args.model, "task": task.name, "out": str(folder), "analyses": found}, indent=2))
    elif found:
        print(f"written to {folder}")


def _check(args: Namespace) -> None:
    """Raises `UserError` for what can be refused before anything slow happens."""
    check_counts(args, "limit", "batch")
    check_counts(args, "seed", least=0)
    check_folder(args)


def _write(subject: Subject, name: str, rows: list[Row]) -> None:
    """The table, each line with what it was measured on, and the figure where matplotlib is there."""
    from vlmzip.cli.loading import note
    from vlmzip.files import write_csv
    from vlmzip.lab.curves import save_figure
    from vlmzip.lab.machine import about as machine
    from vlmzip.visualize.figure import import_matplotlib

    conditions = {"model": subject.name, "task": subject.task.name, **machine(subject.model.device)}
    write_csv(subject.folder / f"{name}.csv", [{**row, **conditions} for row in rows])
    try:
        import_matplotlib()
    except UserError as error:
        note(f"there is no figure of {name}: {error}")
        return
    title = f"{subject.name} on {subject.task.name}, {len(subject.task.samples):,} questions"
    save_figure(find(name).draw(rows, title), subject.folder / f"{name}.png")
