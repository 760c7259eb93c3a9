"""Several training processes on one machine: start them, divide a batch among them, and average their gradients.

accelerate's `PartialState` has the index and the device of this process.
"""

import os
import sys
from collections.abc import Iterable, Sequence

import torch
from accelerate import PartialState
from torch import distributed

from vlmzip.children import end_with_launcher

MOST_PROCESSES = 2  # the number that trained the shipped weights


def default_count() -> int:
    """Return 1 with a GPU, else one process per core but at most 2. Two are faster than one with two threads."""
    return 1 if torch.cuda.is_available() else min(MOST_PROCESSES, os.cpu_count() or 1)


def start(module: str, count: int, arguments: Sequence[str]) -> None:
    """Replace this process by torchrun, which runs `python -m module` in `count` processes. Return in each of them.

    torchrun replaces this process, so no parent process can end before its children. With a count of 1, return at
    once.
    """
    if "RANK" in os.environ or count == 1:
        end_with_launcher()
        return
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    os.execve(sys.executable, [*torchrun, "-m", module, *arguments], environment)


def join_processes() -> PartialState:
    """Join the group of processes that torchrun started, or a group of one process, and return it."""
    return PartialState(cpu=not torch.cuda.is_available())


def share(processes: PartialState, batch: int, step: int) -> range:
    """Return the image numbers of this process in a step."""
    part = batch // processes.num_processes
    first = step * batch + processes.process_index * part
    return range(first, first + part)


def average_gradients(processes: PartialState, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace the gradients by their mean over all processes, in one exchange."""
    if processes.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= processes.num_processes
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
