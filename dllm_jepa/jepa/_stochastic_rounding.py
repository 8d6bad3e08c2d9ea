"""Stochastic rounding to bf16, for averages whose updates are far smaller than a bf16 step."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# Elements that are worked on at a time. A chunk needs 13 bytes per element beside the weights: 0.2 GB.
_CHUNK = 2**24


@torch.no_grad()
def stochastic_lerp_(averages: list[Tensor], online: list[Tensor], weight: float) -> None:
    """Move averages by weight * (online - average), computed in fp32 and rounded stochastically to bf16.

    A result between two neighbouring bf16 values becomes either of them, the nearer one with the greater probability,
    so that its expectation is the fp32 result. Random numbers come from the default generator of the device: a seeded
    run repeats, and replicas of a shard stay equal if their ranks' generators are.

    Args:
        averages: bf16, contiguous, changed in place. Of DTensors every rank works on its own shard.
        online: fp32 or bf16, contiguous, shaped and sharded like `averages`.
        weight: share of the distance that an average moves.
    """
    for average, target in zip(averages, online, strict=True):
        own, own_target = own_shard(average), own_shard(target)
        # A view, not reshape: of a copy, the update would be lost.
        chunks = zip(torch.split(own.view(-1), _CHUNK), torch.split(own_target.view(-1), _CHUNK), strict=True)
        update = _compiled_update() if own.is_cuda else _update  # many small kernels would take longer than the model
        for into, towards in chunks:
            update(into, towards, weight)


def own_shard(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor; any other tensor as it is."""
    # Not isinstance: importing DTensor takes half as long as torch itself, and one process has none.
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


def _update(into: Tensor, towards: Tensor, weight: float) -> None:
    into.copy_(_stochastic_bf16_(into.float().lerp_(towards.float(), weight)))


@cache
def _compiled_update() -> Callable[[Tensor, Tensor, float], None]:
    """`_update` as one kernel."""
    compiled: Callable[[Tensor, Tensor, float], None] = torch.compile(_update, dynamic=True, fullgraph=True)
    return compiled


def _stochastic_bf16_(values: Tensor) -> Tensor:
    """Round fp32 `values` in place to neighbouring values that bf16 holds exactly.

    The upper 16 bits of an fp32 number are the bf16 number next to it towards zero, and the lower 16 bits, over 2**16,
    the distance to it in bf16 steps: a uniform 16-bit integer added to the bits carries with just that probability.
    """
    is_nan = values.isnan()  # the bits of a nan can be all ones, and the sum would carry over into a zero
    bits = values.view(torch.int32)
    bits += torch.randint(2**16, bits.shape, dtype=torch.int32, device=bits.device)
    bits &= -(2**16)
    return values.masked_fill_(is_nan, torch.nan)
