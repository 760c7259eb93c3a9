"""From the options about a method to a compressor."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from vlmzip import catalogue, spec
from vlmzip.compressor import Calibratable, Compressor, Profile, missed
from vlmzip.errors import UserError
from vlmzip.keep import parse_keep
from vlmzip.runtime.resample import resampling

log = logging.getLogger(__name__)


def settings(args: Namespace) -> dict[str, Any]:
    """The method's fields as given on the command line."""
    return {name.removeprefix("field_"): value for name, value in vars(args).items() if name.startswith("field_")}


def check_method(args: Namespace, *, draws: bool = False) -> None:
    """Raises `UserError` for wrong fields, or where nothing can be drawn, before anything slow happens."""
    if args.keep is not None:
        parse_keep(args.keep, "--keep")
    method = without_budget(args)
    own = [field for field in method.budget_fields if field in settings(args)]
    if args.keep is not None and own:
        raise UserError(f"give --keep or --{own[0].replace('_', '-')}, not both")
    if draws and resampling(method) is not None:
        raise UserError(f"each token of {method.name()} comes from the whole image: there is no token map to draw")


def refuse_second_budgets(methods: Iterable[tuple[str, Compressor | None]], keep: object, otherwise: str) -> None:
    """Raise `UserError` for a method in a list that is written with a budget, where `--keep` gives another.

    Methods that decide by content are left out: without calibration they run as written, and their rows say so.
    """
    for name, method in methods:
        if method is not None and not isinstance(method.stages()[0], Calibratable):
            spec.refuse_second_budget(name, keep, otherwise)


def make_method(args: Namespace, profile: Profile) -> Compressor:
    """The compressor that the options ask for; where the method has no `keep`, its nearest configuration.

    Tells where that is not near.
    """
    method = without_budget(args)
    if args.keep is None:
        return method.placed(profile)
    if "keep" in method.field_names():
        return method
    chosen, reached = method.at_budget(args.keep, profile)
    if said := missed(args.keep, reached, profile):
        log.warning(f"{method.name()}: {said}")
    return chosen


def without_budget(args: Namespace) -> Compressor:
    """The compressor that the options ask for; `--keep` counts only where the method has such a field."""
    if not spec.is_name(args.method):
        if args.keep is not None:
            spec.refuse_second_budget(args.method, args.keep, "give one of them")
        method = spec.read(args.method)
        takes_keep = args.keep is not None and "keep" in method.field_names()
        return method.with_keep(args.keep) if takes_keep else method
    cls = catalogue.find(args.method)
    given = settings(args)
    if args.keep is not None and "keep" in cls.field_names():
        given["keep"] = args.keep
    return catalogue.make(cls, given)
