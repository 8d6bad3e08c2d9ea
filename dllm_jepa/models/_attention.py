"""Bidirectional attention over padded rows or packed sequences, and rotate-half rotary embeddings.

Shape legend: B rows, T tokens of a row, N tokens of a packed row, D hidden, H query heads, K key/value heads,
h head size, S packed sequences, L longest sequence of a bucket.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import MultiHeadAttention, RMSNorm

from dllm_jepa.kv_cache import KVCache
from dllm_jepa.packing import PackedSequences

AttentionMask = Tensor | PackedSequences | KVCache | None
"""None: every token sees its whole row. bool [B, T]: True at real tokens. `PackedSequences`: tokens see their own.
`KVCache`: the fed tokens see their whole row, of which it keeps the rest; `input_pos` then says which are fed."""


PackedAttention = Callable[[Tensor, Tensor, Tensor, PackedSequences], Tensor]
"""Attention within each sequence of a packed row; arguments and result as of `bucketed_attention`."""


class RotaryEmbedding(Qwen2RotaryPositionalEmbeddings):
    """Rotate-half rotary embedding, computed in fp32 whatever the type of its input.

    Both LLaDA and Dream store their query and key weights for this layout, so no weight has to be permuted.
    """

    cache: Tensor

    def reset(self) -> None:
        """Compute the table anew, in fp32, on the device it is on."""
        with self.cache.device:
            self.rope_init()  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, input_pos: Tensor | None = None) -> Tensor:
        """Rotate queries or keys.

        Args:
            x: [B, T, heads, h].
            input_pos: int64 [B, T], position of each token in its sequence; None counts from 0 at the left edge.

        Returns:
            [B, T, heads, h], in the type of `x`.
        """
        cache = self.cache[: x.size(1)] if input_pos is None else self.cache[input_pos]
        cos, _, sin, _ = cache.unsqueeze(-2).chunk(4, dim=-1)  # [B or -, T, 1, h / 2]; both halves have the same angles
        first, second = x.float().view(*x.shape[:-1], 2, -1).unbind(-2)
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2)
        return rotated.flatten(-2).to(x.dtype)


class CastRMSNorm(RMSNorm):
    """RMSNorm that normalizes in fp32, casts back and only then multiplies by its weight, as both families do."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps)
        # Compiled for any number of tokens, a module has open numbers for floats, and a layer with one is traced twice.
        self._eps = repr(float(eps))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize over the last dimension; shape and type of `x` are kept."""
        return F.rms_norm(x.float(), self.normalized_shape, eps=float(self._eps)).to(x.dtype) * self.scale


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


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it loops over lengths known on the host only
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


class BidirectionalAttention(MultiHeadAttention):
    """Multi-head attention in which every token of a sequence sees all of it; grouped key/value heads allowed."""

    pos_embeddings: RotaryEmbedding
    packed_attention: PackedAttention = staticmethod(bucketed_attention)  # `choose_packed_attention` sets another

    def forward(  # type: ignore[override]  # the mask may be more than a tensor
        self, x: Tensor, y: Tensor | None = None, *, mask: AttentionMask = None, input_pos: Tensor | None = None
    ) -> Tensor:
        """Self-attention.

        Args:
            x: [B, T, D].
            y: not used; part of the signature because torchtune's layer passes its input twice.
            mask: see `AttentionMask`.
            input_pos: int64 [B, T], position of each token in its sequence.

        Returns:
            [B, T, D].
        """
        # Not `self.head_dim`: compiled for any number of tokens, a sharded layer takes its integers for unknown, too,
        # and kernels for an unknown head size are slow, or there are none. Sizes of its tables are known.
        head_dim = self.pos_embeddings.cache.size(-1) // 2
        q, k, v = (
            projection(x).unflatten(-1, (-1, head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, T, H or K, h]
        q = self.pos_embeddings(q, input_pos=input_pos)
        k = self.pos_embeddings(k, input_pos=input_pos)
        if isinstance(mask, PackedSequences):
            out = self.packed_attention(q[0], k[0], v[0], mask).unsqueeze(0)
        elif isinstance(mask, KVCache):
            out = padded_attention(q, *mask.update(self, k, v, input_pos), mask.key_mask)
        else:
            out = padded_attention(q, k, v, mask)
        projected: Tensor = self.output_proj(out.flatten(-2))
        return projected
