"""Options that commands share: which model, which method with which fields."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, Namespace
from typing import Any

from vlmzip import catalogue
from vlmzip.compressor import Compressor, Profile
from vlmzip.errors import UserError
from vlmzip.keep import parse_keep

DEFAULT_METHOD = "visionzip"
#: Options of commands that draw or ask; a method's fields cannot have these names.
OWN_OPTIONS = {
    "model", "device", "dtype", "method", "baseline", "overlay", "max_new_tokens", "json", "out", "histogram", "help"
}  # fmt: skip


def add_model(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="mini", help="checkpoint folder or hub id; default: mini, which ships with vlmzip"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, …; default: a GPU if there is one")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16 or float16; default: the checkpoint's")


def add_answer_length(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens", type=int, default=32, metavar="N", help="length of the answer; default: %(default)s"
    )


def check_answer_length(args: Namespace) -> None:
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {args.max_new_tokens}: give at least 1")


def add_method(parser: ArgumentParser, arguments: list[str], default: str = DEFAULT_METHOD) -> None:
    """`--method`, `--keep`, and every field of the method that `arguments` choose."""
    parser.add_argument(
        "--method",
        default=default,
        help="a name from `vlmzip methods`, or package.module:Class; default: %(default)s",
    )
    parser.add_argument("--keep", help="visual tokens to keep per picture: 64, 0.25 or 25%%")
    first = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--method", nargs="?", default=default)
    chosen = first.parse_known_args(arguments)[0].method or default
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


def check_method(args: Namespace) -> None:
    """Raises `UserError` for wrong fields, before anything slow happens."""
    if args.keep is not None:
        parse_keep(args.keep)
    method = _without_budget(args)
    takes_keep = "keep" in method.field_names()
    if args.keep is not None and not takes_keep and set(settings(args)) - {"site", "positions"}:
        raise UserError(f"give --keep, or the fields of {method.name()}, not both")


def make_method(args: Namespace, profile: Profile) -> Compressor:
    """The compressor that the options ask for; where the method has no `keep`, its nearest configuration."""
    method = _without_budget(args)
    if args.keep is None and "layer" not in settings(args):
        return method.placed(profile)
    if args.keep is None or "keep" in method.field_names():
        return method
    return method.at_budget(args.keep, profile)[0]


def _without_budget(args: Namespace) -> Compressor:
    cls = catalogue.find(args.method)
    given = settings(args)
    if args.keep is not None and "keep" in cls.field_names():
        given["keep"] = args.keep
    return catalogue.make(cls, given)
