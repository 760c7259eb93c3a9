"""Options of `vlmzip methods`."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction

from vlmzip.sites import KINDS, Signal, Site

EXAMPLES = """  vlmzip methods
  vlmzip methods visionzip
  vlmzip methods --kind prune --no-text-aware --without cls_attention attention_received
  vlmzip methods my_package.my_method:MyMethod --json"""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("name", nargs="?", help="a method, or package.module:Class")
    parser.add_argument("--kind", choices=KINDS, help="list methods of this kind")
    parser.add_argument("--site", choices=[str(site) for site in Site], help="list methods that can act here")
    parser.add_argument(
        "--text-aware", action=BooleanOptionalAction, help="list methods that read the question, or that do not"
    )
    parser.add_argument(
        "--trained-weights", action=BooleanOptionalAction, help="list methods that need training first, or that do not"
    )
    parser.add_argument(
        "--videos-only", action=BooleanOptionalAction, help="list methods that leave images alone, or all others"
    )
    parser.add_argument(
        "--without", nargs="+", default=[], choices=[str(signal) for signal in Signal], metavar="SIGNAL",
        help="leave out methods that need these signals, such as cls_attention",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
