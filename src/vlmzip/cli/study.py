"""`vlmzip study`: repeat the papers' analyses on any model, each with a figure and a table."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path

from vlmzip.cli._options.common import check_counts, check_folder
from vlmzip.cli._shared.loading import load
from vlmzip.errors import UserError
from vlmzip.files import write_csv
from vlmzip.lab.analyses import NAMES, about, find
from vlmzip.lab.analyses.subject import Row, Subject, Unsuited
from vlmzip.lab.curves import save_figure
from vlmzip.lab.machine import about as machine
from vlmzip.lab.table import print_json
from vlmzip.lab.tasks.catalogue import read_one_task
from vlmzip.lab.tasks.words import warn_of_unknown_words
from vlmzip.processes import Processes
from vlmzip.visualize.figure import import_matplotlib

log = logging.getLogger(__name__)


def run(args: Namespace) -> None:
    names = list(dict.fromkeys(NAMES if "all" in args.names else args.names))
    analyses = {name: find(name) for name in names}
    _check(args)
    task = read_one_task(args.task, args.limit, None)
    folder = args.out or Path("runs", "study", Path(args.model).name)
    found: dict[str, list[Row]] = {}
    with Processes() as processes:
        loaded = load(args.model, processes.device(args.device), args.dtype, allow_pickle=args.allow_pickle)
        if processes.first:
            warn_of_unknown_words(loaded, task)
        subject = Subject(loaded.model, loaded.processor, args.model, task, folder, args.batch, args.seed, processes)
        refused: list[Unsuited] = []
        for name, analysis in analyses.items():
            try:
                rows = analysis.measure(subject)
            except Unsuited as error:
                refused.append(error)
                if "all" not in args.names or len(refused) == len(analyses):
                    raise
                log.warning(f"there is no {name}: {error}")
                continue
            if processes.first:
                found[name] = rows
                _write(subject, name, rows)
                if not args.json:
                    print("\n".join([f"{name}: {about(name)}", *analysis.findings(rows), ""]))
    if found and args.json:
        print_json({"model": args.model, "task": task.name, "out": str(folder), "analyses": found})
    elif found:
        print(f"written to {folder}")


def _check(args: Namespace) -> None:
    """Raise `UserError` for invalid options before the model is loaded."""
    check_counts(args, "limit", "batch")
    check_counts(args, "seed", least=0)
    check_folder(args)


def _write(subject: Subject, name: str, rows: list[Row]) -> None:
    """Write the table, with model, task and machine in each row, and the figure if matplotlib is installed."""
    conditions = {"model": subject.name, "task": subject.task.name, **machine(subject.model.device)}
    write_csv(subject.folder / f"{name}.csv", [{**row, **conditions} for row in rows])
    try:
        import_matplotlib()
    except UserError as error:
        log.warning(f"there is no figure of {name}: {error}")
        return
    title = f"{subject.name} on {subject.task.name}, {len(subject.task.samples):,} questions"
    save_figure(find(name).draw(rows, title), subject.folder / f"{name}.png")
