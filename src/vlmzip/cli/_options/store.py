"""`--store`, for commands that answer about stored images."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path


def add_store(parser: ArgumentParser, arguments: list[str], does: str) -> None:
    """Add `--store` after `--model` and `--method`. With it, model and method are the store's unless they are given.

    `method_is_given` of the result tells whether the arguments have `--method`, which has a default otherwise.
    """
    parser.add_argument("--store", type=Path, metavar="STORE", help=does)
    names = {word.partition("=")[0] for word in arguments}
    parser.set_defaults(method_is_given="--method" in names)
    if "--store" in names:
        parser.set_defaults(model=None)
