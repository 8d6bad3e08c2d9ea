"""Sharded modules: wrapping, filling with weights, and reading them back one tensor at a time.

Modules are built on the meta device, sharded, and only then given memory, so that no rank ever holds a full copy.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from dllm_jepa.training._ranks import Ranks

ReadWeight = Callable[[str, slice | None], Tensor]
"""Reads a weight by parameter name, whole or only some of its rows, to CPU."""


def shard(module: nn.Module, units: Iterable[nn.Module], ranks: Ranks, compute_dtype: torch.dtype) -> nn.Module:
    """Shard a module over the ranks with FSDP2, in place; nothing for one process.

    Gradients are summed over ranks, not averaged: our losses are local sums over global counts.

    Args:
        module: module, on the meta device.
        units: submodules that are gathered on their own, in the order of use.
        ranks: the ranks.
        compute_dtype: type in which weights are gathered and used. Gradients are reduced in fp32.
    """
    if ranks.mesh is None:
        return module
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for unit in (*units, module):
        # Said explicitly because FSDP keeps a root gathered after its forward, and no backward frees the target's.
        fully_shard(unit, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=True)
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.set_force_sum_reduction_for_comms(True)
            submodule.set_gradient_divide_factor(1.0)
    return module


@torch.no_grad()
def materialize(module: nn.Module, read: ReadWeight | None, *, dtype: torch.dtype, device: torch.device) -> None:
    """Give a module on the meta device memory and weights; a rank reads only its own rows.

    Buffers are left uninitialized: they are the caller's.

    Args:
        module: module on the meta device, sharded or not.
        read: gives the weights; None leaves them uninitialized, to be filled by the caller.
        dtype: type of the stored weights.
        device: where they go.
    """
    module.to(dtype).to_empty(device=device)
    if read is None:
        return
    for name, weight in module.state_dict().items():
        if isinstance(weight, DTensor):
            local = weight.to_local()
            local.copy_(read(name, _own_rows(weight, local.size(0))))
        else:
            weight.copy_(read(name, None))


def full_tensors(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights, gathered one at a time; every rank has to iterate to the end."""
    for name, weight in weights.items():
        yield name, full_tensor(weight)


def full_tensor(value: Tensor) -> Tensor:
    """A sharded or partial tensor as a plain one; on all ranks at once."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _own_rows(weight: DTensor, num_own: int) -> slice:
    """The rows of a parameter that FSDP gave to this rank: chunk `coordinate` of torch.chunk over the shard ranks."""
    coordinate = weight.device_mesh.get_coordinate()
    if coordinate is None:
        raise RuntimeError("this process is not part of the mesh its parameters are sharded over")
    for mesh_dim, placement in enumerate(weight.placements):
        if isinstance(placement, Shard):
            num_chunks = weight.device_mesh.size(mesh_dim)
            start = min(-(-weight.size(0) // num_chunks) * coordinate[mesh_dim], weight.size(0))
            return slice(start, start + num_own)
    return slice(0, num_own)
