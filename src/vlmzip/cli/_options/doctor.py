"""Options of `vlmzip doctor`."""

from __future__ import annotations

from argparse import ArgumentParser

EXAMPLES = """  vlmzip doctor
  vlmzip doctor --json"""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")
