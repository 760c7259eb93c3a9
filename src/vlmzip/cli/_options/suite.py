"""Options of `vlmzip eval` for benchmarks by way of lmms-eval."""

from __future__ import annotations

from argparse import ArgumentParser

from vlmzip.lab.lmms.suites import FORMS


def add_arguments(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("benchmarks of the field, by way of lmms-eval (the extra lmms)")
    group.add_argument("--suite", metavar="SUITE", help=f"in place of --tasks: {FORMS}")
    group.add_argument("--include-path", metavar="FOLDER", help="tasks of your own in lmms-eval's format, for --suite")
