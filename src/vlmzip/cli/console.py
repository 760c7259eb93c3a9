"""The console that commands print to."""

from __future__ import annotations

from typing import NoReturn

from rich import console


class Console(console.Console):
    """Rich's console, which leaves it to `main` what happens when nobody reads the output any more."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError
