"""Options of `vlmzip models`."""

from __future__ import annotations

from argparse import ArgumentParser

EXAMPLES = """  vlmzip models
  vlmzip models internvl
  vlmzip models internvl --check"""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("name", nargs="*", help="model types, such as qwen2_5_vl; each method is listed")
    parser.add_argument(
        "--check",
        action="store_true",
        help="build tiny models with random weights and try them now, with the installed transformers",
    )
    parser.add_argument("--out", metavar="FILE", help="with --check: write all results as JSON")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="with --check: processes (default 1)")
    parser.add_argument("--json", action="store_true", help="print JSON")
