"""Read the budget of a command that compares methods."""

from __future__ import annotations

from argparse import Namespace

from vlmzip.keep import AS_SET
from vlmzip.lab.budgets import REMAINING, read_budget


def budget_of(args: Namespace) -> str | None:
    """Return the budget of `--average-keep` or `--keep`, or None for `as-set`. Raise `UserError` if it is invalid."""
    if args.keep is None:
        budget = read_budget(args.average_keep, "--average-keep", "")
    else:
        budget = read_budget(args.keep, "--keep", REMAINING)
    return None if budget == AS_SET else budget
