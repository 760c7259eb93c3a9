"""Options of `vlmzip tokens`."""

from __future__ import annotations

from argparse import ArgumentParser

from vlmzip.cli._options.method import add_method

EXAMPLES = """  vlmzip tokens examples/flat.png --keep 16
  vlmzip tokens a.jpg b.jpg --question "What differs?" --model llava-hf/llava-v1.6-vicuna-7b-hf --keep 25% --json
  vlmzip tokens --size 1280x720 --model Qwen/Qwen2.5-VL-7B-Instruct --method dfmr"""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.usage = f"{parser.prog} [IMAGE…] [--size WxH] [options]"
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="images of the request; only their sizes matter")
    parser.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="WxH",
        help="an image of this size, such as 1280x720; can be repeated",
    )
    parser.add_argument("--question", default="", metavar="TEXT", help="text of the request; default: none")
    parser.add_argument(
        "--model",
        default="mini",
        help="checkpoint folder or hub id, without its weights; default: mini, which ships with vlmzip",
    )
    add_method(parser, arguments)
    parser.add_argument("--json", action="store_true", help="print JSON")
