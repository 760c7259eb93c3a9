"""`vlmzip COMMAND …`: finds the command, runs it, turns a user's mistake into one line and exit code 2."""

from __future__ import annotations

import io
import os
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib import import_module
from typing import NoReturn

from vlmzip.errors import UserError, closest, telling_beyond_positions
from vlmzip.version import __version__

#: What each command does. Each is a module of this package that has `EXAMPLES`, `add_arguments(parser, arguments)`
#: and `run(args)`.
COMMANDS = {
    "ask": "ask a vision-language model about one or several pictures",
    "bench": "measure speed and memory at the dimensions of a large model, with random weights",
    "calibrate": "set a method's threshold so that your pictures meet a budget on average",
    "compare": "ask one question with every method at one budget, and show the answers side by side",
    "eval": "score methods at several budgets on whole sets of questions, with intervals, curves and a report",
    "methods": "list the compression methods, or the fields of one",
    "models": "list the model families that vlmzip can compress",
    "show": "draw which visual tokens of pictures are kept, merged and dropped",
    "study": "repeat the papers' analyses on a model: what attends to what, which tokens matter, at which layer",
    "train": "train a model with compression, in stages that a YAML file describes",
    "tune": "find the method and budget that stay within a cost and a loss on your questions",
}


class Parser(ArgumentParser):
    """Says what is wrong in one line instead of printing the usage first."""

    def __init__(self, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog, None, description, epilog, allow_abbrev=False, formatter_class=RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def refuse_unknown(self, unknown: list[str]) -> None:
        """Raises `UserError` for arguments that nothing has taken, with the closest option."""
        options = [option for option in self._option_string_actions if option.startswith("--")]
        for word in unknown:
            name = word.partition("=")[0]
            if not name.startswith("-"):
                raise UserError(f"{self.prog} has no use for {word!r}; see {self.prog} --help")
            raise UserError(f"{self.prog} has no option {name}{closest(name, options)}{_owners(name)}")


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0 done, 2 the input is wrong, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an arrow must not end a command on an ASCII terminal
    try:
        _run(arguments)
    except UserError as error:
        print(f"vlmzip: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vlmzip: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output stopped (`vlmzip methods | head -1`): nothing is wrong, but Python would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _run(arguments: list[str]) -> None:
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_overview())
    elif name == "--version":
        print(f"vlmzip {__version__}")
    elif name not in COMMANDS:
        raise UserError(f"there is no command {name!r}{closest(name, COMMANDS)}")
    else:
        command = import_module(f"vlmzip.cli.{name}")
        parser = Parser(prog=f"vlmzip {name}", description=COMMANDS[name], epilog=f"examples:\n{command.EXAMPLES}")
        command.add_arguments(parser, arguments[1:])
        args, unknown = parser.parse_known_intermixed_args(arguments[1:])
        parser.refuse_unknown(unknown)
        from vlmzip.children import end_with_launcher

        end_with_launcher()
        try:
            with telling_beyond_positions(_note):
                command.run(args)
        except (UserError, OSError):
            raise
        except Exception as error:
            from vlmzip.cli.loading import refuse_model_at_fault

            refuse_model_at_fault(error)
            raise


def _note(text: str) -> None:
    from vlmzip.cli.loading import note

    note(text)


def _owners(option: str) -> str:
    """The methods that have the field of an option, which only `--method` brings in."""
    from vlmzip import outline

    field = option.removeprefix("--").replace("-", "_")
    names = [method.name for method in outline.methods() if field in method.fields]
    return f"; {', '.join(names)} has such a field: --method {names[0]}" if names else ""


def _overview() -> str:
    lines = ["usage: vlmzip COMMAND …", "", "Answer questions about pictures with a fraction of the visual tokens.", ""]
    lines += [f"  {name:<11}{does}" for name, does in COMMANDS.items()]
    return "\n".join([*lines, "", "vlmzip COMMAND --help shows a command's options and examples."])


if __name__ == "__main__":
    if not sys.flags.safe_path and sys.path[0] == os.getcwd():
        del sys.path[0]  # `python -m` puts it there, and whatever lies in it would pass for a library
    sys.exit(main())
