"""Options of `vlmzip encode`."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path

from vlmzip.cli._options.common import add_model
from vlmzip.cli._options.method import add_method

EXAMPLES = """  vlmzip encode photos --out store --keep 36
  vlmzip encode photos --out store --model llava-hf/llava-1.5-7b-hf --method visionzip --keep 64 --dtype bfloat16
  vlmzip encode photos --out store --workers 8
  vlmzip encode photos --out store --keep 36 --update
  vlmzip encode --verify store

Run the same command again to continue a store that was stopped, or to add new images.
vlmzip ask --store STORE IMAGE QUESTION answers from it."""


def add_arguments(parser: ArgumentParser, arguments: list[str]) -> None:
    parser.usage = f"{parser.prog} FOLDER --out STORE [options], or {parser.prog} --verify STORE"
    parser.add_argument("folder", type=Path, nargs="?", metavar="FOLDER", help="images, also in folders below")
    parser.add_argument("--out", type=Path, metavar="STORE", help="a folder for the compressed tokens")
    parser.add_argument("--verify", type=Path, metavar="STORE", help="compare all checksums of a store")
    add_model(parser)
    add_method(parser, arguments)
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N", help="images that are encoded together; default: %(default)s"
    )
    parser.add_argument(
        "--shard", type=int, default=64, metavar="N", help="images in a file of tokens; default: %(default)s"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N",
        help="processes, by Ray Data if more than 1 (extra ray); on a cluster with RAY_ADDRESS; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--update",
        action="store_true",
        help="also encode images again that have changed or are damaged in the store, and remove those that are gone",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
