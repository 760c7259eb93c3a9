"""Options of `vlmzip convert`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

EXAMPLES = """  vlmzip convert MGM-2B --clip clip-vit-large-patch14-336 \\
      --convnext CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup --out mgm-2b
  vlmzip ask photo.jpg "What is this?" --model ./mgm-2b --method visionzip --keep 64"""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.add_argument("checkpoint", type=Path, help="the folder of a Mini-Gemini by its authors, such as MGM-2B")
    parser.add_argument("--clip", type=Path, required=True, metavar="DIR", help="the folder of its CLIP")
    parser.add_argument(
        "--convnext", type=Path, required=True, metavar="DIR", help="the folder of its ConvNeXt by OpenCLIP, or a file"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for the result")
