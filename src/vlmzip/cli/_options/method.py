"""`--method`, and an option for each field of the method that it names."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser
from collections.abc import Collection
from pathlib import Path

from vlmzip import blueprint
from vlmzip.errors import UserError
from vlmzip.files import is_file
from vlmzip.outline import FILE, METHOD_FORMS, is_name

DEFAULT_METHOD = "visionzip"
#: Options of the commands that take `--method`. The fields of a method cannot have these names.
OWN_OPTIONS = {
    "model", "device", "dtype", "allow_pickle", "method", "baseline", "overlay", "json", "out",
    "histogram", "help", "frames", "engine", "host", "port", "name", "api_key_file", "allow_hosts", "size", "question",
    "max_new_tokens", "max_batch", "max_queue", "max_seconds", "max_images", "max_pixels", "max_body",
    "quiet", "store", "verify", "batch", "shard", "workers",
}  # fmt: skip


def add_method(
    parser: ArgumentParser,
    arguments: list[str],
    default: str = DEFAULT_METHOD,
    budgets: Collection[str] = ("keep",),
) -> None:
    """Add `--method`, `--keep`, and an option for each field of the method that `arguments` name.

    A spec such as `visionzip(keep=16)` has its fields inside, so it gets no options. Without `--method`, the command
    uses the compressor saved with the model, if there is one, and `default` otherwise. `budgets` are the fields whose
    options belong to the command.
    """
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
    if not is_name(chosen):
        return
    method, descriptions = blueprint.method(chosen)
    fields = parser.add_argument_group(f"fields of {method.name}")
    for field in descriptions:
        if field.name in OWN_OPTIONS:
            raise UserError(f"{method.name} has a field {field.name!r}, which is an option of vlmzip itself: rename it")
        if field.name not in budgets:
            fields.add_argument(
                f"--{field.name.replace('_', '-')}",
                dest=f"field_{field.name}",
                default=SUPPRESS,
                metavar="VALUE",
                help=f"{field.doc} ({field.type}; default {field.default})".replace("%", "%%"),
            )
