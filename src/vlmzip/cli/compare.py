"""`vlmzip compare IMAGE… QUESTION`: answer one question with every method, side by side."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.table import Table
from rich.text import Text

from vlmzip import spec
from vlmzip.cli._options.common import check_counts
from vlmzip.cli._shared.budget import budget_of
from vlmzip.cli._shared.images import check_target, load_image, save_image
from vlmzip.cli._shared.loading import load
from vlmzip.cli._shared.method import refuse_second_budgets
from vlmzip.cli._shared.words import split_images_and_question
from vlmzip.errors import UserError
from vlmzip.files import refuse_source, write_text
from vlmzip.lab.asking import build_inputs, seen_images
from vlmzip.lab.compare.compare import compare
from vlmzip.lab.compare.output import OUTCOME, Comparison, Seen, as_json, page, sheet
from vlmzip.lab.table import Console, print_json
from vlmzip.runtime.videos import is_video

log = logging.getLogger(__name__)
#: Characters per line. On a narrower terminal or pipe, answers and costs get a table each.
WIDE = 112


def run(args: Namespace) -> None:
    paths, question = split_images_and_question(args.words, "compare")
    _check(args, paths)
    budget = budget_of(args)
    methods = spec.candidates(args.methods)
    if budget is not None:
        refuse_second_budgets([(candidate.name, candidate.method) for candidate in methods], budget)
    for path in paths:
        if is_video(path):
            raise UserError(f"compare takes images, and {path!r} is a video: use vlmzip ask for it")
        load_image(path)
    loaded = load(args.model, args.device, args.dtype, allow_pickle=args.allow_pickle)
    inputs = build_inputs(loaded, paths, question)
    rows = compare(loaded, inputs, methods, budget, repeats=args.repeats, max_new_tokens=args.max_new_tokens)
    device, dtype = loaded.model.device, loaded.model.dtype
    comparison = Comparison(rows, args.model, question, paths, budget, args.repeats, device, dtype)
    try:
        _write(comparison, partial(seen_images, loaded, inputs, paths), args.sheet, args.html)
    finally:  # print the answers even if the disk is full; the files precede a closed pipe (`| head -5`)
        _print(comparison, args)
    if broken := [row.method for row in rows if row.broke]:
        log.info(f"{', '.join(broken)} failed; the notes below the table say why")
        sys.exit(1)


def _write(comparison: Comparison, seen: Seen, sheet_file: Path | None, html_file: Path | None) -> None:
    if sheet_file:
        save_image(sheet(comparison, seen), sheet_file, comparison.paths)
    if html_file:
        text = page(comparison, seen)
        write_text(html_file, text)


def _print(comparison: Comparison, args: Namespace) -> None:
    if not args.json:
        _print_tables(comparison)
        return
    files = {name: str(path) for name, path in (("sheet", args.sheet), ("html", args.html)) if path}
    print_json(as_json(comparison) | files)


def _check(args: Namespace, paths: list[str]) -> None:
    """Raise `UserError` for invalid options before the model is loaded."""
    check_counts(args, "max_new_tokens", "repeats")
    if args.sheet:
        check_target(args.sheet, paths)
    if args.html:
        refuse_source(args.html, paths)
        if args.html.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"{str(args.html)!r} would not open in a browser; try {args.html.stem}.html")


def _print_tables(comparison: Comparison) -> None:
    console = Console(highlight=False)
    console.print(Text(comparison.title, style="bold"), Text(comparison.budget), "", sep="\n")
    everything = range(len(comparison.table.headings))
    parts = [everything] if console.width >= WIDE else [everything[:OUTCOME], [0, *everything[OUTCOME:]]]
    for columns in parts:
        console.print(_table(comparison, columns), "", sep="\n")
    for note in comparison.notes:
        console.print(Text(note))


def _table(comparison: Comparison, columns: Sequence[int]) -> Table:
    """Return a table of some columns. Answers may wrap; numbers never do."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        heading = comparison.table.headings[column]
        words = heading in ("method", "answer", "visual tokens")
        header = Text(heading.replace(" ", "\n"))
        table.add_column(header, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in comparison.rows:
        cells = comparison.table.texts(row)
        styles = {1: "yellow"} if row.differs else {}
        table.add_row(*(Text(cells[column], style=styles.get(column, "")) for column in columns))
    return table
