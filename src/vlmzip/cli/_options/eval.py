"""Options of `vlmzip eval`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from vlmzip.cli._options import suite
from vlmzip.cli._options.budget import add_budget
from vlmzip.cli._options.common import TASKS, add_model
from vlmzip.outline import METHOD_FORMS

DEFAULT_TASKS = "mini"
KEEP = "75%,50%,25%,11%"
EXAMPLES = """  vlmzip eval --limit 300 --methods visionzip,pool2d --average-keep 25%,11% --report
  vlmzip eval --tasks mini,easy-vqa --average-keep 75%,50%,25%,11%,5.6% --out runs/eval/all
  vlmzip eval --model llava-hf/llava-1.5-7b-hf --tasks my_questions:vqa --calibrate-on other_photos --keep 192,64
  vlmzip eval --methods "dfmr(tau=0.3),tuned/compressor.json" --average-keep as-set
  vlmzip eval --tasks gqa:exact --model llava-hf/llava-1.5-7b-hf --methods visionzip --keep 64 --against visionzip
  vlmzip eval --suite llavolta13 --model llava-hf/llava-1.5-7b-hf --methods visionzip --keep 64
  accelerate launch --multi_gpu --num_processes 4 -m vlmzip.cli.main eval --model llava-hf/llava-1.5-7b-hf …

Run the same command again to continue an interrupted run: no question is asked twice."""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    add_model(parser)
    parser.add_argument(
        "--methods",
        metavar="A,B,…",
        help=f"separated by commas, each {METHOD_FORMS}; default: all that need no training",
    )
    add_budget(parser, default=KEEP, in_words=KEEP, several=True)
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
