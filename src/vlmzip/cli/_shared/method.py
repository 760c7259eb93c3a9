"""Make a compressor from a command's options."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterable

from vlmzip import catalogue, spec
from vlmzip.compressor import Calibratable, Compressor, Profile, missed
from vlmzip.errors import UserError
from vlmzip.keep import parse_keep
from vlmzip.lab.budgets import refuse_second
from vlmzip.outline import is_name
from vlmzip.runtime.resample import resampling

log = logging.getLogger(__name__)


def settings(args: Namespace) -> dict[str, object]:
    """Return the method's fields that were given as options."""
    return {name.removeprefix("field_"): value for name, value in vars(args).items() if name.startswith("field_")}


def check_method(args: Namespace, *, draws: bool = False) -> None:
    """Raise `UserError` for invalid fields before the model is loaded; with `draws`, also without a token map."""
    if args.keep is not None:
        parse_keep(args.keep, "--keep")
    method = without_budget(args)
    fields = [field for field in method.budget_fields if field in settings(args)]
    if args.keep is not None and fields:
        raise UserError(f"give --keep or --{fields[0].replace('_', '-')}, not both")
    if draws and resampling(method) is not None:
        raise UserError(f"{method.name()} makes each token from the whole image, so there is no token map to draw")


def refuse_second_budgets(methods: Iterable[tuple[str, Compressor | None]], budget: str) -> None:
    """Raise `UserError` if a method of a list has a budget in its spec and an option gives another one.

    Methods that decide by image content are accepted: uncalibrated, they run with the settings of their spec, and the
    note of their row says so.
    """
    for name, method in methods:
        if method is not None and not isinstance(method.stages()[0], Calibratable):
            refuse_second(name, budget)


def make_method(args: Namespace, profile: Profile) -> Compressor:
    """Return the compressor that the options ask for.

    For a method without a field `keep`, return its configuration nearest to the budget, and log a warning if that
    misses the budget.
    """
    method = without_budget(args)
    if args.keep is None:
        return method.placed(profile)
    if "keep" in method.field_names():
        return method
    chosen, reached = method.at_keep(args.keep, profile)
    if note := missed(args.keep, reached, profile):
        log.warning(f"{method.name()}: {note}")
    return chosen


def without_budget(args: Namespace) -> Compressor:
    """Return the compressor that the options ask for. Ignore `--keep` if the method has no such field."""
    if not is_name(args.method):
        if args.keep is not None:
            spec.refuse_second_budget(args.method, args.keep, "give one of them")
        method = spec.read(args.method)
        takes_keep = args.keep is not None and "keep" in method.field_names()
        return method.with_keep(args.keep) if takes_keep else method
    cls = catalogue.find(args.method)
    values = settings(args)
    if args.keep is not None and "keep" in cls.field_names():
        values["keep"] = args.keep
    return catalogue.make(cls, values)
