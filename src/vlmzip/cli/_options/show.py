"""Options of `vlmzip show`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from vlmzip.cli._options.common import add_frames, add_model
from vlmzip.cli._options.method import add_method

EXAMPLES = """  vlmzip show examples/cluttered.png
  vlmzip show examples/flat.png examples/cluttered.png --keep 25% --out tokens.png
  vlmzip show photo.jpg --method pool2d --factor 2 --model ./llava-1.5-7b"""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE|VIDEO", help="one or several images or videos")
    add_model(parser)
    add_frames(parser)
    add_method(parser, arguments)
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to draw; default: IMAGE_METHOD.png in this folder"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
