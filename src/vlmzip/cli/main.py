"""`vlmzip COMMAND …`: run a command, and turn a user's mistake into one line and exit code 2."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn, TextIO

from vlmzip import outline
from vlmzip.children import end_with_launcher
from vlmzip.errors import UserError, closest, telling_beyond_positions
from vlmzip.progress import showing
from vlmzip.version import __version__

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

log = logging.getLogger("vlmzip.cli.main")  # not __name__, which is __main__ for `python -m vlmzip.cli.main`
#: The commands and their descriptions. A command has a module in `_options`, with `EXAMPLES` and
#: `add_arguments(parser, arguments)` and without slow imports, and a module in `cli`, with `run(args)`.
COMMANDS = {
    "ask": "ask a vision-language model about one or several images",
    "bench": "measure speed and memory at the dimensions of a large model, with random weights",
    "calibrate": "set a method's threshold so that your images meet a budget on average",
    "compare": "ask one question with every method at one budget, and show the answers side by side",
    "convert": "make a Mini-Gemini that transformers loads from the checkpoint of its authors",
    "doctor": "print versions and devices, and which commands miss a package",
    "encode": "write the compressed visual tokens of many images to a store, to ask about them often",
    "eval": "score methods at several budgets on whole sets of questions, with intervals, curves and a report",
    "methods": "list the compression methods, or the fields of one",
    "models": "list the model families that vlmzip can compress",
    "serve": "answer requests of OpenAI's API about images, with compressed visual tokens",
    "show": "draw which visual tokens of images are kept, merged and dropped",
    "study": "repeat the papers' analyses on a model: what attends to what, which tokens matter, at which layer",
    "tokens": "count the tokens of a request before it is sent, without running the model",
    "train": "train a model with compression, in stages that a YAML file describes",
    "tune": "find the method and budget that stay within a cost and a loss on your questions",
}


class Parser(ArgumentParser):
    """A parser that reports an error in one line, without the usage text."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog, None, description, epilog, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter
        )

    def print_help(self, file: SupportsWrite[str] | None = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse ignores a failing write

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def refuse_unknown(self, unknown: list[str]) -> None:
        """Raise `UserError` for arguments that no option takes, with the closest option."""
        options = [option for option in self._option_string_actions if option.startswith("--")]
        for word in unknown:
            name = word.partition("=")[0]
            if not name.startswith("-"):
                raise UserError(f"unexpected argument {word!r}; see {self.prog} --help")
            raise UserError(f"{self.prog} has no option {name}{closest(name, options)}{_owners(name)}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return the exit code.

    0: done; 1: an output cannot be written; 2: invalid input; 130: interrupted.
    """
    if "_ARGCOMPLETE" in os.environ:  # the shell asks which words can follow
        import_module("vlmzip.cli._shared.completion").complete(COMMANDS)  # needs argcomplete, an extra
    arguments = sys.argv[1:] if arguments is None else arguments
    _open_streams()
    try:
        try:
            _run(arguments)
        finally:
            sys.stdout.flush()  # report a failing write here, before Python prints a traceback
    except UserError as error:
        return _end(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        return _end("interrupted", 130)
    except BrokenPipeError:  # the reader closed the pipe (`vlmzip methods | head -1`), which is not an error
        _drop(sys.stdout)
    except OSError as error:
        _drop(sys.stdout)
        return _end(_what_failed(error), 1)
    return 0


def _end(reason: str, code: int) -> int:
    """Print why a command ends, and return its exit code."""
    try:
        print(f"vlmzip: {reason}", file=sys.stderr, flush=True)
    except OSError:
        _drop(sys.stderr)
    return code


def _open_streams() -> None:
    """Make sure that stdout and stderr accept any text.

    The shell may have closed them, and a terminal may support only ASCII.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _drop(stream: TextIO) -> None:
    """Discard what has not been written to a stream yet."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _what_failed(error: OSError) -> str:
    reason = error.strerror or " ".join(str(error).split())
    if error.filename:
        return f"{os.fspath(error.filename)!r}: {reason}"
    return reason if error.errno is None else f"the output cannot be written: {reason}"


def _refuse_no_text(arguments: list[str]) -> None:
    """Raise `UserError` for an argument that is not UTF-8 or has a zero byte: tokenizers and JSON files need text."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise UserError(f"{argument!r} is not UTF-8; rename the file, or set the terminal to UTF-8") from None
        if "\0" in argument:
            raise UserError(f"{argument!r} has a zero byte in it; leave it out")


def _run(arguments: list[str]) -> None:
    _refuse_no_text(arguments)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_overview())
    elif name == "--version":
        print(f"vlmzip {__version__}")
    elif name not in COMMANDS:
        raise UserError(f"unknown command {name!r}{closest(name, COMMANDS)}")
    else:
        options = import_module(f"vlmzip.cli._options.{name}")
        parser = Parser(prog=f"vlmzip {name}", description=COMMANDS[name], epilog=f"examples:\n{options.EXAMPLES}")
        options.add_arguments(parser, arguments[1:])
        args, unknown = parser.parse_known_intermixed_args(arguments[1:])
        parser.refuse_unknown(unknown)
        end_with_launcher()
        from vlmzip.cli._shared.console import log_on_stderr, show_work  # needs rich, which help texts do not

        command = import_module(f"vlmzip.cli.{name}")  # only now: most of them need torch, which takes seconds
        with log_on_stderr(), showing(show_work), telling_beyond_positions(log.warning):
            try:
                command.run(args)
            except (UserError, OSError):
                raise
            except Exception as error:
                from vlmzip.cli._shared.loading import refuse_known_cause  # needs torch

                refuse_known_cause(error, args)
                raise


def _owners(option: str) -> str:
    """Return a hint that names the methods with this field, or "". Such options exist only with `--method`."""
    field = option.removeprefix("--").replace("-", "_")
    names = [method.name for method in outline.methods() if field in method.fields]
    if not names:
        return ""
    *others, last = names
    have = f"{', '.join(others)} and {last} have" if others else f"{last} has"
    return f"; {have} this field: --method {' or '.join(names)}"


def _overview() -> str:
    lines = ["usage: vlmzip COMMAND …", "", "Answer questions about images with a fraction of the visual tokens.", ""]
    lines += [f"  {name:<11}{does}" for name, does in COMMANDS.items()]
    return "\n".join([*lines, "", "vlmzip COMMAND --help shows a command's options and examples."])


if __name__ == "__main__":
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():
        del sys.path[0]  # `python -m` adds it, and files in it would shadow libraries
    sys.exit(main())
