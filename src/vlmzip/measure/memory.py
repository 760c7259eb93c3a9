"""The memory that a run takes at its highest, beyond what is there before it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vlmzip.errors import UserError

#: For the environment of a process whose memory is measured on the CPU: its allocator gives back at once what is freed,
#: so that what ran before is not taken for what runs now.
FRUGAL = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

#: The same settings by their numbers in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def available_bytes(device: str | torch.device = "cpu") -> int | None:
    """Memory that a process can still take there; `None` where nobody tells."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return 1024 * int(found.group(1)) if found else None
    return None


@contextmanager
def freeing_at_once() -> Iterator[None]:
    """In the block this process's allocator gives back at once what is freed, as with `FRUGAL`. Time outside it.

    With glibc; elsewhere nothing happens. Begin before there was much to free: what lies between used memory is filled
    again, in pieces that fit badly. Behind the block it keeps what is freed up to where glibc's own thresholds grow to.
    """
    libc = _libc()
    if libc is None:
        yield
        return
    libc.mallopt(M_TRIM_THRESHOLD, 65536)
    libc.mallopt(M_MMAP_THRESHOLD, 65536)
    try:
        yield
    finally:
        libc.mallopt(M_TRIM_THRESHOLD, 64 * 2**20)
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)


def peak_bytes(run: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Peak of one run, after another that is not counted: what libraries set up at their first use is there to stay.

    On a CPU this is the process's resident memory (Linux only): measure in a fresh process with `FRUGAL` set,
    or inside `freeing_at_once`.
    """
    run()
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        libc = _libc()
        if libc is not None:
            libc.malloc_trim(0)  # what the allocator holds back would be used again, and not seen
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = _resident("VmRSS")
        run()
        return max(_resident("VmHWM") - before, 0)
    except OSError:
        raise UserError("peak memory on a CPU is read from /proc, which only Linux has") from None


def _libc() -> Any:
    """glibc, if that is what this process runs on."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status does not tell {field}")
    return 1024 * int(found.group(1))
