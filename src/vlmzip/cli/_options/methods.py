"""Options of `vlmzip methods`."""

from __future__ import annotations

from argparse import ArgumentParser

EXAMPLES = """  vlmzip methods
  vlmzip methods visionzip
  vlmzip methods my_package.my_method:MyMethod --json"""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("name", nargs="?", help="a method, or package.module:Class")
    parser.add_argument("--json", action="store_true", help="print JSON")
