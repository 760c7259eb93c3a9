"""The processes of a run, which `accelerate launch` or `torchrun` started, and their communication."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from filelock import BaseFileLock
from torch import distributed

from vlmzip.errors import UserError, how_to_install
from vlmzip.locks import hold

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")
#: How long a process waits for the others. Some processes may finish long before others.
PATIENCE = timedelta(days=7)


class Processes:
    """The processes that a launcher started, or this process alone.

    As a context manager, it opens the process group for communication and destroys it at the end. In a training run,
    Trainer opens the group.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self._held: list[BaseFileLock] = []
        self._state: PartialState | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, name: str | None) -> str | None:
        """Return `name`. If it is `None`, several processes run and GPUs exist, return the GPU of this process."""
        if name is not None or self.count == 1 or not torch.cuda.is_available():
            return name
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"

    def __enter__(self) -> Processes:
        """Open the process group. Raise `UserError` if several processes run and accelerate is not installed."""
        if self.count > 1:
            try:
                from accelerate import PartialState  # from an extra; a single process does not need it
            except ImportError:
                raise UserError(f"several processes need accelerate: {how_to_install('eval')}") from None
            self._state = PartialState(cpu=True, timeout=PATIENCE)  # they exchange little data, never on a GPU
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        if self._state is not None:
            self._state.destroy_process_group()

    def hold(self, folder: Path) -> None:
        """Keep other runs out of a folder until the context ends. Raise `UserError` if another run holds it."""
        self._held.append(hold(folder, self.rank))

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` in the first process and return its result, or raise its `UserError`, in all processes."""
        if self.count == 1:
            return make()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = make()
            except UserError as error:
                box[1] = error
        distributed.broadcast_object_list(box)
        if box[1] is not None:
            raise box[1]
        result: T = box[0]
        return result

    def together(self, mine: dict[str, str]) -> dict[str, str]:
        """Wait for all processes and return their entries in one dict."""
        if self.count == 1:
            return mine
        entries: list[dict[str, str]] = [{}] * self.count
        distributed.all_gather_object(entries, mine)
        return {key: value for entry in entries for key, value in entry.items()}


def leave_group() -> None:
    """Leave the process group that Trainer opened, if there is one.

    A process that ends with an open group can crash, because threads of the backend outlive the interpreter.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
