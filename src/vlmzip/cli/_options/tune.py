"""Options of `vlmzip tune`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from vlmzip.cli._options.budget import add_budget
from vlmzip.cli._options.common import TASKS, add_model
from vlmzip.outline import METHOD_FORMS

EXAMPLES = """  vlmzip tune --max-loss 5 --limit 1000
  vlmzip tune --max-tokens 16 --methods visionzip,kmeans,pool2d
  vlmzip tune --model llava-hf/llava-1.5-7b-hf --task my_questions:vqa --max-prefill-ms 60 --max-loss 2
  vlmzip tune --task my_questions:exact --calibrate-on other_photos --max-flops 30% --average-keep 40%,30%,20%,10%

With a cost and a loss: the cheapest that meets both. With a cost alone: the best score within it. With a loss alone:
the cheapest within it, in visual tokens. Half of the images choose the candidate, the other half confirms it. A loss is
certified as within the limit only if a larger loss would have shown on the confirming half in 39 of 40 cases; otherwise
the result says that only the estimate is within the limit. If no candidate meets the limits, no compressor.json is
written, and the exit code is still 0. The exit code is 1 if a candidate broke.
Run the same command again to continue an interrupted run: no question is asked twice."""

KEEP = "75%,50%,36%,25%,18%,11%,8%,5.6%"


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    add_model(parser)
    limits = parser.add_argument_group("limits: one of the costs, --max-loss, or both")
    costs = limits.add_mutually_exclusive_group()
    costs.add_argument(
        "--max-tokens", metavar="Y", help="visual tokens per image, the mean over all layers of the LLM: 64 or 11%%"
    )
    costs.add_argument(
        "--max-flops", metavar="SHARE", help="prefill FLOPs of the LLM, as a share of those without compression: 30%%"
    )
    costs.add_argument(
        "--max-prefill-ms",
        type=float,
        metavar="X",
        help="milliseconds of the LLM's prefill on this machine, one question at a time, measured at the beginning",
    )
    limits.add_argument(
        "--max-loss",
        type=float,
        metavar="Z",
        help="points, of 100, that the score may be below that without compression",
    )
    parser.add_argument(
        "--task", "--tasks", dest="task", default="mini", metavar="T", help=f"{TASKS}; default: %(default)s"
    )
    parser.add_argument(
        "--methods",
        metavar="A,B,…",
        help=f"separated by commas, each {METHOD_FORMS}; default: all that need no training",
    )
    add_budget(parser, default=KEEP, in_words=KEEP, several=True)
    parser.add_argument("--limit", type=int, metavar="N", help="use only the first questions of the task")
    parser.add_argument(
        "--calibrate-on", metavar="FOLDER", help="images for the thresholds of methods that decide by content"
    )
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="questions at a time; default: %(default)s")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="length of answers; default: the task's")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where results go; default: runs/tune/MODEL")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the halves, the order of questions and the intervals"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
