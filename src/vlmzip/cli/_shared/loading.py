"""Load a model for a command, and say what to do if it fails."""

from __future__ import annotations

import re
from argparse import Namespace

import torch

from vlmzip.cli._shared.console import progress
from vlmzip.errors import UserError
from vlmzip.lab.table import show_bytes
from vlmzip.runtime import loading
from vlmzip.runtime.loading import Loaded


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
