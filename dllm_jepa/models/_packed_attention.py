"""Kernels of attention within the sequences of a packed row, and the choice of one for a whole run.

Shape legend: N tokens of the row, H query heads, K key/value heads, h head size.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn

from dllm_jepa.models._attention import BidirectionalAttention, PackedAttention, bucketed_attention
from dllm_jepa.packing import PackedSequences

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}

# torch 2.11 has no such argument; later versions refuse grouped heads without it.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, packing: PackedSequences) -> Tensor:
    """The variable-length flash kernel; arguments and result as of `bucketed_attention`, in half precision."""
    bounds, longest = packing.cu_seqlens, packing.max_seqlen
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, **_GROUPED)
    assert isinstance(out, Tensor), type(out)  # a pair only when the log-sum-exp is asked for
    return out


@torch.compiler.disable(recursive=False)  # type: ignore[untyped-decorator, no-untyped-call]  # compiled on its own
def flex_attention_of_packed(q: Tensor, k: Tensor, v: Tensor, packing: PackedSequences) -> Tensor:
    """Flex attention with a mask of the sequences; arguments and result as of `bucketed_attention`."""
    rows = (heads.transpose(0, 1).unsqueeze(0) for heads in (q, k, v))  # [1, H or K, N, h]
    out: Tensor = _compiled_flex()(*rows, block_mask=_block_mask(packing), enable_gqa=True)
    return out[0].transpose(0, 1)


KERNELS: dict[str, PackedAttention] = {
    "varlen": varlen_attention,
    "flex": flex_attention_of_packed,
    "sdpa": bucketed_attention,
}


def packed_kernel(
    device_type: str, capability: tuple[int, int] | None, compute_dtype: torch.dtype, head_dim: int
) -> str:
    """Name of the fastest kernel that is right for a run; all of them take grouped heads.

    fp32 stays with the reference on GPUs, too: what is computed in fp32 is computed to be compared.

    Args:
        device_type: as of a `torch.device`.
        capability: of the GPU; None on another device.
        compute_dtype: type of queries, keys and values.
        head_dim: head size.

    Returns:
        A key of `KERNELS`.
    """
    if device_type != "cuda" or capability is None or capability < (8, 0):
        return "sdpa"
    if compute_dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    # Flash kernels of larger heads have no backward pass on some of these GPUs.
    if head_dim % 8 == 0 and head_dim <= 192:
        return "varlen"
    return "flex" if head_dim >= 16 else "sdpa"  # the smallest matrix product of Triton


def choose_packed_attention(module: nn.Module, device: torch.device, compute_dtype: torch.dtype) -> str:
    """Set the kernel for packed rows on every attention of a module, once before a run.

    Args:
        module: a model or a backbone.
        device: where it runs.
        compute_dtype: type of queries, keys and values: that of autocast or of FSDP's mixed precision.

    Returns:
        One line that says which and why, to be logged.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    where = device.type if capability is None else "sm_{}{}".format(*capability)
    (head_dim,) = {attention.head_dim for attention in _attentions(module)}
    name = packed_kernel(device.type, capability, compute_dtype, head_dim)
    set_packed_attention(module, name)
    return f"packed attention: {name} ({_NAMES[compute_dtype]} on {where}, head size {head_dim})"


def set_packed_attention(module: nn.Module, name: str) -> None:
    """Set a kernel for packed rows on every attention of a module.

    Args:
        module: a model or a backbone.
        name: a key of `KERNELS`.
    """
    for attention in _attentions(module):
        attention.packed_attention = KERNELS[name]


def _attentions(module: nn.Module) -> list[BidirectionalAttention]:
    return [part for part in module.modules() if isinstance(part, BidirectionalAttention)]


@cache
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # computed once per packing, not traced into a layer
def _block_mask(packing: PackedSequences) -> object:
    return packing.block_mask
