"""Completion of words in the shell, by argcomplete: commands, options, methods and their fields."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from importlib import import_module

import argcomplete
from argcomplete.completers import DirectoriesCompleter

from vlmzip import outline
from vlmzip.errors import UserError


def complete(commands: Mapping[str, str]) -> None:
    """Give the shell the words that can follow its line, and end the process."""
    before = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    words = before.split() if before.endswith(" ") else before.split()[:-1]  # the last one is not finished
    root = ArgumentParser("vlmzip")
    root.add_argument("--version", action="store_true", help="print the version")
    parsers = root.add_subparsers()
    for name, does in commands.items():
        parser = parsers.add_parser(name, help=does)
        if words[1:2] == [name]:  # of the other commands only the names are needed
            _add_options(parser, name, words[2:])
    argcomplete.autocomplete(root)


def _add_options(parser: ArgumentParser, command: str, words: list[str]) -> None:
    """Add the options of a command, with those of the method that its words name."""
    options = import_module(f"vlmzip.cli._options.{command}")
    try:
        options.add_arguments(ArgumentParser(), words)
    except UserError:  # of an unknown method there are no fields
        words = []
    options.add_arguments(parser, words)
    for action in parser._actions:
        completer = COMPLETERS.get(action.option_strings[0] if action.option_strings else f"{command} {action.dest}")
        if completer is not None:
            action.completer = completer  # type: ignore[attr-defined]  # argcomplete looks for this attribute


def _methods(prefix: str, **more: object) -> list[str]:
    return [method.name for method in outline.methods()]


def _several_methods(prefix: str, **more: object) -> list[str]:
    """Return the methods that may follow in a list with commas."""
    *done, _ = prefix.split(",")
    return [",".join([*done, name]) for name in _methods("") if name not in done]


def _models(prefix: str, **more: object) -> list[str]:
    return ["mini", *DirectoriesCompleter()(prefix)]


#: What completes the values of options, and of arguments by command and name. File names complete the others.
COMPLETERS: dict[str, Callable[..., list[str]]] = {
    "--method": _methods,
    "--methods": _several_methods,
    "--model": _models,
    "methods name": _methods,
}
