"""Options of `vlmzip compare`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from vlmzip.cli._options.budget import add_budget
from vlmzip.cli._options.common import add_answer_length, add_model
from vlmzip.keep import A_NINTH
from vlmzip.outline import METHOD_FORMS

EXAMPLES = """  vlmzip compare examples/cluttered.png "what color is the ring ?" --average-keep 25%
  vlmzip compare photo.jpg "What is on the table?" --methods "visionzip(merge=mean),pool2d+fastv" --sheet tokens.png
  vlmzip compare a.png b.png "What differs?" --average-keep 64 --html page.html --model llava-hf/llava-1.5-7b-hf"""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.usage = f"{parser.prog} IMAGE… QUESTION [options]"
    parser.add_argument("words", nargs="+", metavar="IMAGE… QUESTION", help="one or several images, then the question")
    add_model(parser)
    parser.add_argument("--methods", metavar="A,B,…", help=f"separated by commas, each {METHOD_FORMS}; default: all")
    add_budget(parser, default=A_NINTH, in_words="a ninth", several=False)
    parser.add_argument("--sheet", type=Path, metavar="FILE", help="draw the tokens of every method on one sheet")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write everything as one page for the browser")
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="timed runs of each method; default: %(default)s"
    )
    add_answer_length(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
