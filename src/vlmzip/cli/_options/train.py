"""Options of `vlmzip train`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from vlmzip import blueprint
from vlmzip.schema import REQUIRED

EXAMPLES = """  vlmzip train configs/llava-1.5-7b-llavolta.yaml --explain --shape llava-1.5-7b --set steps=5196
  vlmzip train configs/mini.yaml --set steps=200 --set schedule=two-stage
  torchrun --nproc-per-node 8 -m vlmzip.cli.main train configs/llava-1.5-7b-llavolta.yaml

Run the same command again to resume from the last checkpoint."""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the settings of the run; see configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting that replaces the file's"
    )
    parser.add_argument("--explain", action="store_true", help="print what the schedule costs, and train nothing")
    parser.add_argument(
        "--shape", metavar="NAME", help="with --explain: the shape of a published model, such as llava-1.5-7b"
    )
    parser.add_argument("--staircase", type=Path, metavar="FILE.png", help="with --explain: draw the schedule")
    parser.add_argument("--json", action="store_true", help="with --explain: print JSON")
    if {"-h", "--help"} & set(arguments):
        parser.epilog = f"{parser.epilog}\n\n{_settings()}"


def _settings() -> str:
    """Return a list of the file's settings, with their defaults and meanings."""
    lines = ["settings, in the file or by --set:"]
    for field in blueprint.describe("vlmzip.training.config", "Config"):
        default = "" if field.default in (REQUIRED, None, "{}") else f" = {field.default}"
        lines.append(f"  {field.name + default:<32} {field.doc}")
    return "\n".join(lines)
