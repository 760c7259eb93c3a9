"""`vlmzip study`: repeat the papers' analyses on any model, each with a figure and a table."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

from vlmzip.cli._options.common import check_counts, check_folder
from vlmzip.cli._shared.loading import load
from vlmzip.errors import UserError
from vlmzip.lab.analyses import NAMES, about, find
from vlmzip.lab.analyses.subject import Subject, Unsuited
from vlmzip.lab.curves import plot_title, save_figure
from vlmzip.lab.machine import about as machine
from vlmzip.lab.table import Table, print_json, table_of
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
    tables: dict[str, Table[Mapping[str, object]]] = {}
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
                log.warning(f"{name} is skipped: {error}")
                continue
            if processes.first:
                tables[name] = table_of(rows, _conditions(subject))
                _write(subject, name, tables[name])
                if not args.json:
                    print("\n".join([f"{name}: {about(name)}", *analysis.findings(rows), ""]))
    if tables and args.json:
        analyses_rows = {name: table.as_json() for name, table in tables.items()}
        print_json({"model": args.model, "task": task.name, "out": str(folder), "analyses": analyses_rows})
    elif tables:
        print(f"written to {folder}")


def _check(args: Namespace) -> None:
    """Raise `UserError` for invalid options before the model is loaded."""
    check_counts(args, "limit", "batch")
    check_counts(args, "seed", least=0)
    check_folder(args)


def _conditions(subject: Subject) -> dict[str, str]:
    """Return model, task and machine, which are columns of every table."""
    return {"model": subject.name, "task": subject.task.name, **machine(subject.model.device)}


def _write(subject: Subject, name: str, table: Table[Mapping[str, object]]) -> None:
    """Write the table, and the figure if matplotlib is installed."""
    table.write_csv(subject.folder / f"{name}.csv")
    try:
        import_matplotlib()
    except UserError as error:
        log.warning(f"no figure of {name} is drawn: {error}")
        return
    analysis = find(name)
    title = plot_title(analysis.TITLE, subject.name, subject.task)
    save_figure(analysis.draw(table.rows, title), subject.folder / f"{name}.png")
