"""Options that commands share: which model, which method with which fields."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmzip.errors import UserError
from vlmzip.files import is_file, refuse_place
from vlmzip.keep import parse_keep
from vlmzip.outline import METHOD_FORMS

if TYPE_CHECKING:
    from vlmzip.compressor import Compressor, Profile

DEFAULT_METHOD = "visionzip"
#: Options of commands that draw or ask; a method's fields cannot have these names.
OWN_OPTIONS = {
    "model", "device", "dtype", "allow_pickle", "method", "baseline", "overlay", "max_new_tokens", "json", "out",
    "histogram", "help"
}  # fmt: skip


def add_model(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="mini", help="checkpoint folder or hub id; default: mini, which ships with vlmzip"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, …; default: a GPU if there is one")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16 or float16; default: the checkpoint's")
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pickled weights (pytorch_model.bin) too, which can run code: only of checkpoints that you trust",
    )


def add_answer_length(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="length of the answer; default: %(default)s"
    )


def check_answer_length(args: Namespace) -> None:
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: give at least 1")


def check_counts(args: Namespace, *names: str, least: int = 1) -> None:
    """Raises `UserError` for an option, if it is given, that is below `least`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: give at least {least}")


def check_folder(args: Namespace) -> None:
    """Raises `UserError` for an --out that cannot be a folder."""
    if args.out is None:
        return
    refuse_place(args.out, "--out")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {str(args.out)!r} is a file; give a folder")


def add_method(parser: ArgumentParser, arguments: list[str], default: str = DEFAULT_METHOD) -> None:
    """`--method`, `--keep`, and every field of the method that `arguments` choose, if it is given by name alone.

    Left out, it is the compressor saved with the model, if there is one.
    """
    from vlmzip import catalogue, spec
    from vlmzip.compressor_file import FILE

    parser.add_argument(
        "--method",
        help=f"{METHOD_FORMS}; default: what is saved with the model, else {default}",
    )
    parser.add_argument("--keep", help="visual tokens to keep per image: 64, 0.25 or 25%%")
    first = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--method", nargs="?")
    first.add_argument("--model", nargs="?")
    given = first.parse_known_args(arguments)[0]
    saved = default == DEFAULT_METHOD and bool(given.model) and is_file(Path(given.model, FILE))
    default = given.model if saved else default
    chosen = given.method or default
    parser.set_defaults(method=default)
    if not spec.is_name(chosen):
        return
    cls = catalogue.find(chosen)
    fields = parser.add_argument_group(f"fields of {cls.name()}")
    for field in catalogue.describe(cls):
        if field.name in OWN_OPTIONS:
            raise UserError(f"{cls.name()} has a field {field.name!r}, which is an option of vlmzip itself: rename it")
        if field.name != "keep":
            fields.add_argument(
                f"--{field.name.replace('_', '-')}",
                dest=f"field_{field.name}",
                default=SUPPRESS,
                metavar="VALUE",
                help=f"{field.doc} ({field.type}; default {field.default})".replace("%", "%%"),
            )


def settings(args: Namespace) -> dict[str, Any]:
    """The method's fields as given on the command line."""
    return {name.removeprefix("field_"): value for name, value in vars(args).items() if name.startswith("field_")}


def check_method(args: Namespace, *, draws: bool = False) -> None:
    """Raises `UserError` for wrong fields, or where nothing can be drawn, before anything slow happens."""
    from vlmzip.runtime.resample import resampling

    if args.keep is not None:
        parse_keep(args.keep)
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
    from vlmzip import spec
    from vlmzip.compressor import Calibratable

    for name, method in methods:
        if method is not None and not isinstance(method.stages()[0], Calibratable):
            spec.refuse_second_budget(name, keep, otherwise)


def make_method(args: Namespace, profile: Profile) -> Compressor:
    """The compressor that the options ask for; where the method has no `keep`, its nearest configuration.

    Tells where that is not near.
    """
    from vlmzip.cli.loading import note
    from vlmzip.compressor import missed

    method = without_budget(args)
    if args.keep is None:
        return method.placed(profile)
    if "keep" in method.field_names():
        return method
    chosen, reached = method.at_budget(args.keep, profile)
    if said := missed(args.keep, reached, profile):
        note(f"{method.name()}: {said}")
    return chosen


def without_budget(args: Namespace) -> Compressor:
    """The compressor that the options ask for; `--keep` counts only where the method has such a field."""
    from vlmzip import catalogue, spec

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
