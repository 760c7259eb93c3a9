"""Shard parameters among processes by PyTorch's `fully_shard`, and gather them again.

The façade is sharded before transformers' Trainer and accelerate see it. accelerate shards only on GPUs: on a CPU it
silently wraps the model in DDP instead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.optim.optimizer import StateDict
from transformers.integrations import deepspeed

from vlmzip.errors import UserError
from vlmzip.models import family_of
from vlmzip.runtime.facade import CompressedModel


def shard(compressed: CompressedModel, device: torch.device, *, bf16: bool) -> None:
    """Shard the parameters among all processes. Every process must call this.

    Each decoder layer and the projector are gathered when they run, and freed afterwards. The vision encoder stays
    gathered from its forward to the end of the backward; all else (embeddings, head, a method's weights) stays gathered
    for the whole step. With `bf16`, weights are gathered and used in bfloat16, and gradients are summed in float32.
    Raise `UserError` if a parameter is not sharded.
    """
    family, mesh = family_of(compressed.inner), init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for part in (*family.decoder_layers, family.projector):  # before the encoder, which may contain the projector
        fully_shard(part, mesh=mesh, mp_policy=policy)
    # The features are the output of an inner layer, so nothing would gather the encoder again for its backward.
    fully_shard(family.vision_encoder, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    # The façade is the root, not the model: it runs the encoder before the model's own forward.
    fully_shard(compressed, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(compressed, "generate")
    check_sharded(compressed)


def check_sharded(model: nn.Module) -> None:
    """Raise `UserError` if a trainable parameter is not sharded among the processes."""
    for name, parameter in model.named_parameters():
        sharded = isinstance(parameter, DTensor) and any(place.is_shard() for place in parameter.placements)
        if parameter.requires_grad and not sharded:
            raise UserError(f"sharding: {name} is not sharded among the processes")


def moves_together(compressed: nn.Module) -> bool:
    """Return whether parameters are sharded, so that all processes must run the same modules equally often."""
    return isinstance(compressed, FSDPModule) or deepspeed.is_deepspeed_zero3_enabled()


def whole(value: object, keep: bool) -> object:
    """Gather a sharded tensor on the CPU, in the processes that `keep` it; the others get an empty tensor.

    All processes must call this for the same tensors in the same order. Any other value is returned unchanged.
    """
    if not isinstance(value, DTensor):
        return value
    return _gathered(value, keep)


def _gathered(value: DTensor, keep: bool) -> Tensor:
    gathered = value.full_tensor().detach()
    return gathered.cpu() if keep else torch.empty(0)


def whole_state(compressed: CompressedModel, keep: bool) -> dict[str, object]:
    """Return the gathered state dict, the same as without sharding."""
    return {name: whole(value, keep) for name, value in compressed.state_dict().items()}


def make_whole(compressed: CompressedModel, keep: bool) -> None:
    """Replace the sharded parameters by plain ones on the CPU, for saving and merging; tied ones stay tied.

    The model cannot run afterwards.
    """
    for module in compressed.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # drop what an evaluation has gathered, perhaps in bfloat16
    plain: dict[nn.Parameter, nn.Parameter] = {}
    for module in compressed.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if isinstance(parameter, DTensor):
                if parameter not in plain:
                    plain[parameter] = nn.Parameter(_gathered(parameter, keep), requires_grad=parameter.requires_grad)
                setattr(module, name, plain[parameter])


def whole_optimizer(optimizer: Optimizer, keep: bool) -> dict[str, object]:
    """Return the gathered optimiser state, from which a run on any number of processes can resume."""
    state = optimizer.state_dict()
    moments = {
        number: {name: whole(value, keep) for name, value in sorted(state["state"][number].items())}
        for number in sorted(state["state"])
    }
    return {**state, "state": moments}


def shard_optimizer_state(state: StateDict, optimizer: Optimizer) -> StateDict:
    """Return a gathered optimiser state, sharded like the optimiser's parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {name: _like(parameters[number], value) for name, value in sorted(state["state"][number].items())}
        for number in sorted(state["state"])
    }
    return {**state, "state": moments}


def _like(parameter: Tensor, value: object) -> object:
    """Return a value of the optimiser's state, sharded like its parameter if it has the parameter's shape."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value  # such as the number of steps
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
