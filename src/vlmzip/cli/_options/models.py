"""Options of `vlmzip models`."""

from __future__ import annotations

from argparse import ArgumentParser

EXAMPLES = """  vlmzip models
  vlmzip models --json"""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
