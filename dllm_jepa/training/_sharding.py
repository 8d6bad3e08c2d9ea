"""Sharded modules: wrapping, filling with weights, and reading them back one tensor at a time.

Modules are built on the meta device, sharded, and only then given memory, so that no rank ever holds a full copy.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dllm_jepa.errors import LaunchError
from dllm_jepa.training._ranks import Ranks

ReadWeight = Callable[[str, slice | None], Tensor]
"""Reads a weight by parameter name, whole or only some of its rows, to CPU."""


def shard(
    module: nn.Module,
    units: Iterable[nn.Module],
    ranks: Ranks,
    compute_dtype: torch.dtype,
    *,
    kept: nn.Module | None = None,
) -> nn.Module:
    """Shard a module over the ranks with FSDP2, in place; nothing for one process.

    Gradients are summed over ranks, not averaged: our losses are local sums over global counts. While a unit is at
    work, the next one is gathered.

    Args:
        module: module, on the meta device.
        units: submodules that are gathered on their own, in the order of use; all but `kept` in every forward.
        ranks: the ranks.
        compute_dtype: type in which weights are gathered and used. Gradients are reduced in fp32.
        kept: the last of `units`, or the module itself with what is in none of them: stays gathered from its forward to
            its backward; every forward with gradient has to use it.

    What is called on a unit besides `forward` and uses its weights is listed in its attribute `forward_methods`.
    """
    units = [*units]
    if kept not in (None, module, *units[-1:]):
        raise ValueError("kept: only the last of the units, or the module itself, can stay gathered until its backward")
    if ranks.mesh is None:
        return module
    _check_quantized(module, ranks.mesh.size(-1))
    # Inputs come in the compute type; what comes in fp32, as the weights of tokens, must not be rounded.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for unit in (*units, module):
        # Said explicitly because FSDP keeps a root gathered after its forward, and no backward frees the target's.
        fully_shard(unit, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=unit is not kept)
        for method in getattr(unit, "forward_methods", ()):
            register_fsdp_forward_method(unit, method)
    for submodule in module.modules():
        if isinstance(submodule, FSDPModule):
            submodule.set_force_sum_reduction_for_comms(True)
            submodule.set_gradient_divide_factor(1.0)
    _gather_ahead([module, *units], None if kept is module else kept)
    return module


def _gather_ahead(in_order: list[nn.Module], kept: nn.Module | None) -> None:
    """Have each unit gather the next one, and the kept one only if a backward comes that frees it."""
    for unit, following in pairwise(in_order):
        assert isinstance(unit, FSDPModule) and isinstance(following, FSDPModule)
        if following is not kept:
            unit.set_modules_to_forward_prefetch([following])
    if kept is None:
        return
    *_, last, head = in_order
    assert isinstance(last, FSDPModule) and isinstance(head, FSDPModule)

    def before_forward(*_: Any) -> None:
        has_backward = torch.is_grad_enabled()
        last.set_modules_to_forward_prefetch([head] if has_backward else [])
        head.set_reshard_after_forward(not has_backward)

    in_order[0].register_forward_pre_hook(before_forward, prepend=True)


@torch.no_grad()
def materialize(
    module: nn.Module,
    read: ReadWeight | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
    frozen_dtype: torch.dtype | None = None,
) -> None:
    """Give a module on the meta device memory and weights; a rank reads only its own rows.

    A weight that is to be quantized is read whole, quantized and then divided, so that its values do not depend on the
    number of ranks. Buffers are left uninitialized: they are the caller's.

    Args:
        module: module on the meta device, sharded or not.
        read: gives the weights; None leaves them uninitialized, to be filled by the caller.
        dtype: type of the stored weights that are trained.
        device: where they go.
        frozen_dtype: type of the others, and of what quantized ones are made from; None means `dtype`.
    """
    # state_dict knows the names without the wrappers of activation checkpointing.
    names = {id(param): name for name, param in module.state_dict(keep_vars=True).items()}
    for submodule in module.modules():
        for key, param in [*submodule.named_parameters(recurse=False)]:
            stored = dtype if param.requires_grad or frozen_dtype is None else frozen_dtype
            filled = _filled(param, names[id(param)], read, stored, device)
            submodule.register_parameter(key, nn.Parameter(filled, requires_grad=param.requires_grad))
        for key, buffer in [*submodule.named_buffers(recurse=False)]:
            setattr(submodule, key, torch.empty_like(buffer, device=device))


def full_tensors(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Weights, gathered one at a time; every rank has to iterate to the end."""
    return ((name, full_tensor(weight)) for name, weight in weights.items())


def full_tensor(value: Tensor) -> Tensor:
    """A sharded or partial tensor as a plain one; on all ranks at once."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _check_quantized(module: nn.Module, num_ranks: int) -> None:
    for name, param in module.named_parameters():
        if not _is_quantized(param):
            continue
        block = param.block_size * param.scaler_block_size  # type: ignore[attr-defined]
        if param.size(0) % num_ranks or param.numel() % (block * num_ranks):
            raise LaunchError(
                f"{name} has {param.size(0)} rows and {param.numel()} weights, and {num_ranks} ranks can share a "
                f"quantized weight only in equal parts of whole blocks of {block}: start fewer ranks, or set "
                "quantize_base: false"
            )


def _is_quantized(weight: Tensor) -> bool:
    """Whether the rows that a rank holds are in NF4, a tensor made of others."""
    return is_traceable_wrapper_subclass(weight)


def _filled(param: Tensor, name: str, read: ReadWeight | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a parameter on the meta device, filled; sharded as it is."""
    own = param.to_local() if isinstance(param, DTensor) else param.detach()
    if _is_quantized(own):
        if read is None:
            raise ValueError(f"{name} is quantized: it cannot be filled later")
        own = _quantized_rows(param, read(name, None).to(device, dtype))
    else:
        own = torch.empty_like(own, dtype=dtype, device=device)
        if read is not None:
            own.copy_(read(name, _own_rows(param, own.size(0)) if isinstance(param, DTensor) else None))
    if not isinstance(param, DTensor):
        return own
    return DTensor.from_local(
        own, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def _quantized_rows(param: Tensor, weight: Tensor) -> Tensor:
    from torchao.dtypes.nf4tensor import to_nf4  # takes longer to import than torch

    quantized: Tensor = to_nf4(weight)
    if not isinstance(param, DTensor):
        return quantized
    rows = _own_rows(param, param.to_local().size(0))
    num_own = rows.stop - rows.start
    own = torch.chunk(quantized, param.size(0) // num_own)[rows.start // num_own]
    copy: Tensor = own.new_zeros(own.size()).copy_(own)  # the chunk itself would hold on to the whole weight
    return copy


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
