"""Budgets as users write them: an average over all LLM layers, or the tokens that remain after a method acts."""

from __future__ import annotations

from typing import TypeVar

from vlmzip import spec
from vlmzip.compressor import Compressor, Profile, missed
from vlmzip.errors import UserError
from vlmzip.keep import AS_SET, Keep, parse_keep
from vlmzip.spec import Candidate

T = TypeVar("T")
#: What stands before the number in a budget that counts the remaining tokens.
REMAINING = "keep="


def read_rows(methods: str | None, average: str, keep: str | None) -> tuple[list[Candidate], list[str]]:
    """Read the comma-separated lists of `--methods`, and of `--average-keep` or `--keep`.

    Raise `UserError` for an invalid method or budget, and for a method that sets a budget in addition to the option.
    """
    candidates, budgets = spec.candidates(methods), read_budgets(average, keep)
    if set(budgets) != {AS_SET}:
        for candidate in candidates:
            refuse_second(candidate.name, budgets[0])
    return candidates, budgets


def read_budgets(average: str, keep: str | None) -> list[str]:
    """Read the comma-separated budgets of `--average-keep` or `--keep`. Raise `UserError` for an invalid one."""
    option, text, prefix = option_of(average, keep)
    values = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not values:
        raise UserError(f"{option} names no budget; separate them with commas: {option} 50%,25%")
    return [read_budget(value, option, prefix) for value in values]


def option_of(average: T, keep: T | None) -> tuple[str, T, str]:
    """Return the option that gives the budget, its value, and what stands before the number in the budget."""
    return ("--average-keep", average, "") if keep is None else ("--keep", keep, REMAINING)


def read_budget(value: Keep, option: str, prefix: str) -> str:
    """Read one budget. Raise `UserError` if it is invalid."""
    if value == AS_SET:
        return AS_SET
    parse_keep(value, option)
    return f"{prefix}{value}"


def refuse_second(method: str, budget: str) -> None:
    """Raise `UserError` if the method sets a budget in addition to the option."""
    option = "--keep" if counts_remaining(budget) else "--average-keep"
    otherwise = f"take the budget out of the method, or give {option} {AS_SET}"
    spec.refuse_second_budget(method, keep_of(budget), otherwise, option)


def counts_remaining(budget: str) -> bool:
    """Return whether a budget counts the tokens that remain after the method acts."""
    return budget.startswith(REMAINING)


def keep_of(budget: str) -> str:
    """Return the number or share of a budget."""
    return budget.removeprefix(REMAINING)


def fit(method: Compressor, budget: str, profile: Profile) -> tuple[Compressor, float, str]:
    """Return the method at a budget, the share of tokens that it reaches, and a note if that misses the budget.

    The share is an average over all layers, or that of the remaining tokens, as the budget counts. Raise `BudgetError`
    with the reason if the method cannot meet the budget.
    """
    keep = keep_of(budget)
    chosen, reached = (method.at_keep if counts_remaining(budget) else method.at_budget)(keep, profile)
    return chosen, reached, missed(keep, reached, profile)
