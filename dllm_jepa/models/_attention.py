"""Products of bidirectional attention: over padded rows, and within the sequences of a packed row.

Shape legend: B rows, T tokens of a row, N tokens of a packed row, H query heads, K key/value heads, h head size,
S packed sequences, L longest sequence of a bucket.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_jepa.packing import PackedSequences

PackedAttention = Callable[[Tensor, Tensor, Tensor, PackedSequences], Tensor]
"""Attention within each sequence of a packed row; arguments and result as of `bucketed_attention`."""


def padded_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """Bidirectional attention over the rows of a batch.

    Args:
        q: [B, T, H, h], or fewer tokens than keys.
        k: [B, T, K, h].
        v: [B, T, K, h].
        key_mask: bool [B, T], True at real tokens, or None when every token is real.

    Returns:
        As `q`; values at padded positions mean nothing.
    """
    group = q.size(2) // k.size(2)
    # The fused CPU kernels take no grouped heads, and repeating k and v costs little beside the products.
    k, v = (heads.repeat_interleave(group, dim=2) if group > 1 else heads for heads in (k, v))
    mask = None if key_mask is None else key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    ).transpose(1, 2)


def bucketed_attention(q: Tensor, k: Tensor, v: Tensor, packing: PackedSequences) -> Tensor:
    """Bidirectional attention within each sequence of a packed row: the reference, on any device and in any type.

    Padded calls over buckets of similar length.

    Args:
        q: [N, H, h].
        k: [N, K, h].
        v: [N, K, h].
        packing: bounds of the sequences.

    Returns:
        [N, H, h].
    """
    outs = []
    for bucket in packing.buckets:
        # An even row needs no copies. Else index_select on flat rows: its backward is a plain row-wise add, many times
        # faster on CPU than that of q[index].
        flat = (h if packing.is_even else h.flatten(1).index_select(0, bucket.index.flatten()) for h in (q, k, v))
        q_rows, k_rows, v_rows = (h.view(*bucket.index.shape, -1, q.size(-1)) for h in flat)  # [S, L, H or K, h]
        outs.append(padded_attention(q_rows, k_rows, v_rows, bucket.valid).flatten(2).flatten(0, 1))
    rows = torch.cat(outs)  # a copy even of one: compiled layers would be compiled again for another kind of view
    if not packing.is_even:
        rows = rows.index_select(0, packing.bucket_positions)
    return rows.view_as(q)


@cache
def packed_kernel(name: str, *, compiled: bool = False) -> PackedAttention:
    """A kernel for packed rows.

    Args:
        name: `sdpa` is the reference on any device and in any type; `varlen` is the variable-length flash kernel, in
            half precision; `flex` is flex attention with a mask of the sequences, compiled on its own.
        compiled: as compiled layers call it: `sdpa` and `flex` are kept out of their graphs.
    """
    # The compiler and the kernels of GPUs are imported by whoever needs them: they take as long as torch itself.
    if name == "sdpa":
        return torch.compiler.disable(bucketed_attention) if compiled else bucketed_attention  # type: ignore[no-untyped-call]
    if name == "flex":
        flex = _flex_attention()
        return torch.compiler.disable(flex, recursive=False) if compiled else flex  # type: ignore[no-untyped-call]
    assert name == "varlen", name
    return _varlen_attention()


@cache
def _varlen_attention() -> PackedAttention:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 has no such argument; later versions refuse grouped heads without it.
    has_argument = "enable_gqa" in inspect.signature(varlen_attn).parameters
    grouped: dict[str, Any] = {"enable_gqa": True} if has_argument else {}

    def varlen_attention(q: Tensor, k: Tensor, v: Tensor, packing: PackedSequences) -> Tensor:
        bounds, longest = packing.cu_seqlens, packing.max_seqlen
        out = varlen_attn(q, k, v, bounds, bounds, longest, longest, **grouped)
        assert isinstance(out, Tensor), type(out)  # a pair only when the log-sum-exp is asked for
        return out

    return varlen_attention


@cache
def _flex_attention() -> PackedAttention:
    from torch.nn.attention.flex_attention import flex_attention

    attend: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    # Computed once per packing, not traced into a layer.
    block_mask: Callable[[PackedSequences], Any] = torch.compiler.disable(lambda packing: packing.block_mask)  # type: ignore[no-untyped-call]

    def flex_attention_of_packed(q: Tensor, k: Tensor, v: Tensor, packing: PackedSequences) -> Tensor:
        rows = (heads.transpose(0, 1).unsqueeze(0) for heads in (q, k, v))  # [1, H or K, N, h]
        out: Tensor = attend(*rows, block_mask=block_mask(packing), enable_gqa=True)
        return out[0].transpose(0, 1)

    return flex_attention_of_packed


def fastest_kernel(
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
        A name that `packed_kernel` knows.
    """
    if device_type != "cuda" or capability is None or capability < (8, 0):
        return "sdpa"
    if compute_dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    # Flash kernels of larger heads have no backward pass on some of these GPUs.
    if head_dim % 8 == 0 and head_dim <= 192:
        return "varlen"
    return "flex" if head_dim >= 16 else "sdpa"  # the smallest matrix product of Triton
