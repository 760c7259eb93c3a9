"""One training process or several: who am I, average the gradients, save on one."""

import os
from collections.abc import Iterable

import torch
from torch import distributed


class TrainingProcesses:
    """Under torchrun the group it started; else a group of one."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
        if self.count > 1:
            if self.device.type == "cpu":
                torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.count))
            distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, batch: int, step: int) -> range:
        """This process's part of the numbers of the images of a step."""
        mine = batch // self.count
        start = step * batch + self.rank * mine
        return range(start, start + mine)

    def average_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        distributed.all_reduce(flat)
        flat /= self.count
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def wait(self) -> None:
        if self.count > 1:
            distributed.barrier()

    def leave(self) -> None:
        if self.count > 1:
            distributed.destroy_process_group()
