"""`vlmzip compare IMAGE… QUESTION`: what each method makes of one question, side by side."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vlmzip.cli.options import add_answer_length, add_model, check_answer_length, refuse_second_budgets
from vlmzip.errors import UserError
from vlmzip.keep import A_NINTH, AS_SET, parse_keep
from vlmzip.outline import METHOD_FORMS

if TYPE_CHECKING:
    from rich.table import Table

    from vlmzip.cli.compare_output import Comparison, Seen

EXAMPLES = """  vlmzip compare examples/cluttered.png "what color is the ring ?" --keep 25%
  vlmzip compare photo.jpg "What is on the table?" --methods "visionzip(merge=mean),pool2d+fastv" --sheet tokens.png
  vlmzip compare a.png b.png "What differs?" --keep 64 --html page.html --model llava-hf/llava-1.5-7b-hf"""

#: Characters; where a terminal or pipe has fewer, what came out and what it cost get a table each.
WIDE = 112


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.usage = f"{parser.prog} IMAGE… QUESTION [options]"
    parser.add_argument("words", nargs="+", metavar="IMAGE… QUESTION", help="one or several images, then the question")
    add_model(parser)
    parser.add_argument("--methods", metavar="A,B,…", help=f"separated by commas, each {METHOD_FORMS}; default: all")
    parser.add_argument(
        "--keep",
        default=A_NINTH,
        help="visual tokens to keep per image: 64, 0.25 or 25%%; as-set: methods as they are written; default: a ninth",
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="draw the tokens of every method on one sheet")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write everything as one page for the browser")
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="timed runs of each method; default: %(default)s"
    )
    add_answer_length(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: Namespace) -> None:
    from vlmzip import spec
    from vlmzip.cli.asking import build_inputs, seen_images, split_images_and_question
    from vlmzip.cli.compare_output import Comparison
    from vlmzip.cli.comparing import compare
    from vlmzip.cli.images import load_image
    from vlmzip.cli.loading import load, tell

    paths, question = split_images_and_question(args.words, "compare")
    _check(args, paths)
    methods = spec.candidates(args.methods)
    if args.keep is not None:
        named = [(one.name, one.method) for one in methods]
        refuse_second_budgets(named, args.keep, f"take the budget out of the method, or give --keep {AS_SET}")
    for path in paths:
        load_image(path)
    loaded = load(args.model, args.device, args.dtype, allow_pickle=args.allow_pickle)
    inputs = build_inputs(loaded, paths, question)
    rows = compare(loaded, inputs, methods, args.keep, repeats=args.repeats, max_new_tokens=args.max_new_tokens)
    device, dtype = loaded.model.device, loaded.model.dtype
    found = Comparison(rows, args.model, question, paths, args.keep, args.repeats, device, dtype)
    try:
        _write(found, partial(seen_images, loaded, inputs, paths), args.sheet, args.html)
    finally:  # a full disk must not cost the answers, nor a reader that stops early (`| head -5`) the files
        _print(found, args)
    if broken := [row.method for row in rows if row.broke]:
        tell(f"{', '.join(broken)} broke; the note says how")
        sys.exit(1)


def _write(found: Comparison, seen: Seen, sheet_file: Path | None, html_file: Path | None) -> None:
    from vlmzip.cli.compare_output import page, sheet
    from vlmzip.cli.images import save_image
    from vlmzip.files import write_text

    if sheet_file:
        save_image(sheet(found, seen), sheet_file, found.paths)
    if html_file:
        text = page(found, seen)
        write_text(html_file, text)


def _print(found: Comparison, args: Namespace) -> None:
    from vlmzip.cli.compare_output import as_json

    if not args.json:
        _print_tables(found)
        return
    files = {name: str(path) for name, path in (("sheet", args.sheet), ("html", args.html)) if path}
    print(json.dumps(as_json(found) | files, indent=2))


def _check(args: Namespace, paths: list[str]) -> None:
    """Raises `UserError` for what can be refused before anything slow happens, and reads `keep`."""
    from vlmzip.cli.images import check_target
    from vlmzip.files import refuse_source

    if args.keep == AS_SET:
        args.keep = None
    else:
        parse_keep(args.keep)
    check_answer_length(args)
    if args.repeats < 1:
        raise UserError(f"--repeats {args.repeats}: give at least 1")
    if args.sheet:
        check_target(args.sheet, paths)
    if args.html:
        refuse_source(args.html, paths)
        if args.html.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"{str(args.html)!r} would not open in a browser; try {args.html.stem}.html")


def _print_tables(found: Comparison) -> None:
    from rich.text import Text

    from vlmzip.cli.compare_output import COLUMNS, OUTCOME
    from vlmzip.cli.console import Console

    console = Console(highlight=False)
    console.print(Text(found.title, style="bold"), Text(found.budget), "", sep="\n")
    everything = range(len(COLUMNS))
    parts = [everything] if console.width >= WIDE else [everything[:OUTCOME], [0, *everything[OUTCOME:]]]
    for columns in parts:
        console.print(_table(found, columns), "", sep="\n")
    for note in found.notes:
        console.print(Text(note))


def _table(found: Comparison, columns: Sequence[int]) -> Table:
    """Some of the columns; numbers are never broken, answers are."""
    from rich.table import Table
    from rich.text import Text

    from vlmzip.cli.compare_output import COLUMNS

    table = Table(box=None, pad_edge=False)
    for column in columns:
        words = COLUMNS[column] in ("method", "answer", "visual tokens")
        header = Text(COLUMNS[column].replace(" ", "\n"))
        table.add_column(header, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in found.rows:
        cells = found.cells(row)
        styles = {1: "yellow"} if row.differs else {}
        table.add_row(*(Text(cells[column], style=styles.get(column, "")) for column in columns))
    return table
