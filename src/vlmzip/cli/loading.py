"""Load a model for a command: with a spinner, and with notes on stderr."""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from vlmzip.cli.console import Console
from vlmzip.cli.tables import show_bytes
from vlmzip.errors import UserError
from vlmzip.runtime import loading
from vlmzip.runtime.loading import Loaded
from vlmzip.runtime.prompts import unknown_words

if TYPE_CHECKING:
    from vlmzip.lab.tasks.task import Task

console = Console(stderr=True)


def load(name: str, device: str | None = None, dtype: str | None = None, *, allow_pickle: bool = False) -> Loaded:
    """Load a model with a spinner. See `vlmzip.runtime.loading.load`."""
    with progress(f"loading {name}"):
        return loading.load(name, device, dtype, allow_pickle=allow_pickle)


def refuse_too_much_at_once(error: Exception, args: Namespace) -> None:
    """Raise `UserError` where the memory was full, with the options that need less of it; return for other errors."""
    on_cpu = "DefaultCPUAllocator: can't allocate memory" in str(error)  # torch has no class for it
    if not on_cpu and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return
    found = re.search(r"ried to allocate ([\d.]+) ?(\w+)", str(error))
    size, unit = found.groups() if found else ("", "")
    wanted = show_bytes(int(size)) if unit == "bytes" else f"{size} {unit}"
    said = f": {wanted} more were needed" if found else ""
    options = [f"a smaller --{name}" for name in ("batch", "scale") if hasattr(args, name)]
    options += ["--dtype bfloat16"] * (getattr(args, "dtype", "bfloat16") in (None, "float32"))
    options += ["--set batch_per_process=1"] * hasattr(args, "set")
    raise UserError(f"the memory is full{said}; try {', or '.join(options or ['fewer images'])}") from None


def tell(text: str) -> None:
    """Says on stderr, in a line, how far the work is or how it ended."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Says on stderr, in a line, what the user should know but did not ask."""
    tell(f"note: {text}")


def note_unknown_words(loaded: Loaded, task: Task) -> None:
    """Says how many of a task's questions have words that the model has no token for."""
    words = {sample.question: unknown_words(loaded.processor, sample.question) for sample in task.samples}
    strange = [sample.question for sample in task.samples if words[sample.question]]
    if strange:
        note(
            f"{len(strange):,} of {len(task.samples):,} questions of {task.name} have words that {loaded.name}"
            f" does not know, {words[strange[0]][0]!r} for one"
        )


@contextmanager
def progress(what: str) -> Iterator[None]:
    """A spinner on a terminal, nothing elsewhere."""
    if not console.is_terminal:
        yield
        return
    with console.status(f"{what} …"):
        yield
