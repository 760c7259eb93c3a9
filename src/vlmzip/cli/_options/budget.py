"""The options `--average-keep` and `--keep` of the commands that hold methods against each other."""

from __future__ import annotations

from argparse import ArgumentParser

SET = "as-set: methods with the budgets in their specs"


def add_budget(parser: ArgumentParser, *, default: str | float, in_words: str, several: bool) -> None:
    """Add both options, of which a user gives one. `several`: a list, separated by commas."""
    names = "K,K,…" if several else "K"
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--average-keep",
        default=default,
        metavar=names,
        help="visual tokens per image, as an average over all LLM layers: this compares methods before and inside the"
        f" LLM; 64, 0.25 or 25%%; {SET}; default: {in_words.replace('%', '%%')}",
    )
    group.add_argument(
        "--keep",
        metavar=names,
        help="instead: visual tokens per image that remain after the method acts, as papers count them",
    )
