"""Load a model for a command, and say what to do if that fails."""

from __future__ import annotations

import re
from argparse import Namespace

import torch

from vlmzip.cli._shared.console import spinner
from vlmzip.errors import UserError
from vlmzip.lab.table import show_bytes
from vlmzip.runtime import loading
from vlmzip.runtime.loading import Loaded


def load(name: str, device: str | None = None, dtype: str | None = None, *, allow_pickle: bool = False) -> Loaded:
    """Load a model with a spinner. See `vlmzip.runtime.loading.load`."""
    with spinner(f"loading {name}"):
        return loading.load(name, device, dtype, allow_pickle=allow_pickle)


def refuse_known_cause(error: Exception, args: Namespace) -> None:
    """Raise `UserError` if the memory is full or the model is at fault. Return for all other errors."""
    refuse_too_much_at_once(error, args)
    loading.refuse_model_at_fault(error)


def refuse_too_much_at_once(error: Exception, args: Namespace) -> None:
    """Raise `UserError` if the error says that the memory is full. Return for all other errors.

    The message names the options that reduce the memory that the command needs.
    """
    on_cpu = "DefaultCPUAllocator: can't allocate memory" in str(error)  # torch has no exception class for this
    if not on_cpu and not isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return
    match = re.search(r"ried to allocate ([\d.]+) ?(\w+)", str(error))
    size, unit = match.groups() if match else ("", "")
    amount = show_bytes(int(size)) if unit == "bytes" else f"{size} {unit}"
    needed = f": {amount} more were needed" if match else ""
    options = [f"a smaller --{name}" for name in ("batch", "scale") if hasattr(args, name)]
    options += ["--dtype bfloat16"] * (getattr(args, "dtype", "bfloat16") in (None, "float32"))
    options += ["--set batch_per_process=1"] * hasattr(args, "set")
    raise UserError(f"the memory is full{needed}; try {', or '.join(options or ['fewer images'])}") from None
