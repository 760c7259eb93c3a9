"""Parameters shared out among processes: PyTorch's `fully_shard`, and how what is shared out is made whole again.

The façade is sharded before transformers' Trainer and accelerate see it. accelerate would do it on GPUs alone: on a CPU
it wraps the model in DDP instead, and says nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from vlmzip.errors import UserError
from vlmzip.models import adapter_for
from vlmzip.runtime.facade import CompressedModel


def shard(compressed: CompressedModel, device: torch.device, *, bf16: bool) -> None:
    """Shares the parameters out among all processes, which each must call this.

    Each decoder layer and the projector are gathered when they run, and freed; the vision encoder is kept from there to
    the end of the backward, all else (embeddings, head, the weights of a method) for all of a step. With `bf16` weights
    are gathered and computed with in bfloat16, gradients are summed in float32. Raises `UserError` for what stayed
    whole.
    """
    adapter, mesh = adapter_for(compressed.inner), init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for part in (*adapter.decoder_layers, adapter.projector):  # the projector may be a part of the encoder
        fully_shard(part, mesh=mesh, mp_policy=policy)
    # Features are those of an inner layer, so that nothing would gather the encoder again for its backward.
    fully_shard(adapter.vision_encoder, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    # Not the model but the façade is the root: it runs the encoder before the model's own forward.
    fully_shard(compressed, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(compressed, "generate")
    check_sharded(compressed)


def check_sharded(model: nn.Module) -> None:
    """Raises `UserError` if a process holds a parameter that learns whole, or a copy of another process's."""
    for name, parameter in model.named_parameters():
        split = isinstance(parameter, DTensor) and any(place.is_shard() for place in parameter.placements)
        if parameter.requires_grad and not split:
            raise UserError(f"sharding: {name} is not shared out among the processes")


def moves_together(compressed: nn.Module) -> bool:
    """Whether parameters are shared out, so that all processes must run the same modules equally often."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return isinstance(compressed, FSDPModule) or is_deepspeed_zero3_enabled()


def whole(value: Any, keep: bool) -> Any:
    """A shared-out tensor put together on the CPU, in the processes that `keep` it; others get an empty one.

    All processes must call it for the same tensors in the same order. Whatever else is returned as it is.
    """
    if not isinstance(value, DTensor):
        return value
    together = value.full_tensor().detach()
    return together.cpu() if keep else torch.empty(0)


def whole_state(compressed: CompressedModel, keep: bool) -> dict[str, Any]:
    """The state dict as it is without sharding."""
    return {name: whole(value, keep) for name, value in compressed.state_dict().items()}


def make_whole(compressed: CompressedModel, keep: bool) -> None:
    """Ends the sharding: puts plain parameters on the CPU in place of the shared-out ones, ties as they are.

    For saving and merging; the model cannot run any more.
    """
    for module in compressed.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # what an evaluation has gathered is still there, perhaps in bfloat16
    done: dict[nn.Parameter, nn.Parameter] = {}
    for module in compressed.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(parameter, DTensor):
                if parameter not in done:
                    done[parameter] = nn.Parameter(whole(parameter, keep), requires_grad=parameter.requires_grad)
                setattr(module, name, done[parameter])


def whole_optimizer(optimizer: Any, keep: bool) -> dict[str, Any]:
    """The optimiser's state as it is without sharding: a run on any number of processes can go on from it."""
    state = optimizer.state_dict()
    moments = {
        number: {name: whole(value, keep) for name, value in sorted(state["state"][number].items())}
        for number in sorted(state["state"])
    }
    return {**state, "state": moments}


def shard_optimizer_state(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """A whole state, shared out as the optimiser's parameters are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {name: _like(parameters[number], value) for name, value in sorted(state["state"][number].items())}
        for number in sorted(state["state"])
    }
    return {**state, "state": moments}


def _like(parameter: Tensor, value: Any) -> Any:
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value  # the number of steps
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
