"""Options of `vlmzip calibrate`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from vlmzip.cli._options.common import add_frames, add_model
from vlmzip.cli._options.method import add_method

EXAMPLES = """  vlmzip calibrate photos --keep 50%
  vlmzip calibrate photos --keep 160 --model llava-hf/llava-1.5-7b-hf --histogram deviations.png
  vlmzip calibrate clips --keep-per-view 25% --frames 16 --model Qwen/Qwen2.5-VL-7B-Instruct
  vlmzip calibrate a.png b.png c.png --method adaptive_visionzip --keep 25% --json"""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.usage = f"{parser.prog} FOLDER|IMAGE|VIDEO… --keep KEEP [options]"
    parser.add_argument(
        "images",
        nargs="+",
        metavar="FOLDER|IMAGE|VIDEO",
        help="images, videos, and folders of them (without their subfolders)",
    )
    add_model(parser)
    add_frames(parser)
    add_method(parser, arguments, default="dfmr", budgets=("keep", "keep_per_view"))
    parser.add_argument(
        "--keep-per-view", metavar="KEEP", help="in place of --keep: visual tokens to keep per frame of a video or tile"
    )
    parser.add_argument("--histogram", type=Path, metavar="FILE", help="draw how the images' deviations lie (PNG)")
    parser.add_argument("--json", action="store_true", help="print JSON")
