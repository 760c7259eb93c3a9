"""Read the budget of a command that compares methods."""

from __future__ import annotations

from argparse import Namespace

from vlmzip.keep import AS_SET
from vlmzip.lab.budgets import option_of, read_budget


def budget_of(args: Namespace) -> str | None:
    """Return the budget of `--average-keep` or `--keep`, or None for `as-set`. Raise `UserError` if it is invalid."""
    option, value, prefix = option_of(args.average_keep, args.keep)
    budget = read_budget(value, option, prefix)
    return None if budget == AS_SET else budget
