"""Options of `vlmzip study`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from vlmzip.cli._options.common import TASKS, add_model
from vlmzip.lab.analyses import NAMES, about

EXAMPLES = """  vlmzip study tau --limit 300
  vlmzip study all --model llava-hf/llava-1.5-7b-hf --task my_questions:vqa --limit 500

Each writes NAME.csv, NAME.png and NAME.svg into --out. Run the same command again to continue an interrupted run."""


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
