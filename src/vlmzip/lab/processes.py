"""One process or several, started by `accelerate launch` or `torchrun`: who am I, and what do we agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed

from vlmzip.errors import UserError

T = TypeVar("T")
#: One process may be busy for long after the others have finished.
PATIENCE = timedelta(days=7)


class Processes:
    """The group that the launcher started; else a group of one. A context: at its end the group is left."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.held: dict[Path, Any] = {}
        """What keeps other runs out of the folders that this run writes, until it ends."""

    @property
    def first(self) -> bool:
        return self.rank == 0

    def device(self, asked: str | None) -> str | None:
        """The device of this process, unless the user chose one: each its own GPU."""
        if asked is not None or self.count == 1 or not torch.cuda.is_available():
            return asked
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"

    def __enter__(self) -> Processes:
        if self.count > 1:
            # What is exchanged is a few words, never on a GPU.
            distributed.init_process_group("gloo", timeout=PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        self.held.clear()
        if self.count > 1:
            distributed.destroy_process_group()

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, the same in all; a `UserError` there is raised in all."""
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
        return box[0]

    def together(self, mine: dict[str, str]) -> dict[str, str]:
        """What each process has found, in one; waits until all are here."""
        if self.count == 1:
            return mine
        everything: list[Any] = [None] * self.count
        distributed.all_gather_object(everything, mine)
        return {key: value for one in everything for key, value in one.items()}
