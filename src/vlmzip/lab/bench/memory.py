"""Measure the peak memory of a run, beyond the memory in use before it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from vlmzip.children import in_child
from vlmzip.errors import UserError

#: The environment of a process whose memory is measured on the CPU. Its allocator returns freed memory to the system at
#: once, so that memory of earlier runs does not count.
FRUGAL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

T = TypeVar("T")


def available_bytes(device: str | torch.device = "cpu") -> int | None:
    """Return the free memory of a device in bytes, or `None` if the system does not report it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return 1024 * int(match.group(1)) if match else None
    return None


def in_frugal_process(run: Callable[..., Iterable[T]], *arguments: object) -> Iterator[T]:
    """Yield what `run(*arguments)` yields in a fresh process with `FRUGAL` set; see `in_child`."""
    return in_child(run, *arguments, environment=FRUGAL)  # a process reads it once, when it starts


def peak_bytes(run: Callable[[], object], device: str | torch.device = "cpu", *, warm_up: bool = True) -> int:
    """Return the peak memory of a run in bytes.

    A first run is not counted, because libraries keep what they allocate at first use. `warm_up=False` leaves it out,
    for a long run in a process that did similar work before. On a CPU this is the process's resident memory (Linux
    only): measure in a fresh process with `FRUGAL` set.
    """
    if warm_up:
        run()
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        _trim()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _resident("VmRSS")
        run()
        return max(_resident("VmHWM") - before, 0)
    except OSError:
        raise UserError("peak memory on a CPU is read from /proc, which only Linux has") from None


def _trim() -> None:
    """Return the free memory that glibc's allocator holds to the system: reusing it would not show in the peak."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _resident(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return 1024 * int(match.group(1))
