"""The layers of a bidirectional transformer, with the parameter names of torchtune.

Shape legend: B rows, T tokens of a row, D hidden, H query heads, K key/value heads, h head size, m chosen tokens.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_jepa.kv_cache import KVCache
from dllm_jepa.models._attention import (
    PackedAttention,
    bucketed_attention,
    fastest_kernel,
    packed_kernel,
    padded_attention,
)
from dllm_jepa.models._sizes import TransformerSizes
from dllm_jepa.packing import PackedSequences

AttentionMask = Tensor | PackedSequences | KVCache | None
"""None: every token sees its whole row. bool [B, T]: True at real tokens. `PackedSequences`: tokens see their own.
`KVCache`: the fed tokens see their whole row, of which it keeps the rest; `input_pos` then says which are fed."""

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


class RMSNorm(nn.Module):
    """Normalizes in fp32, casts back and only then multiplies by its scale, as both families do."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))
        # Compiled for any number of tokens, a module has open numbers for floats, and a layer with one is traced twice.
        self._eps = repr(float(eps))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize over the last dimension; shape and type of `x` are kept."""
        return F.rms_norm(x.float(), self.scale.shape, eps=float(self._eps)).to(x.dtype) * self.scale


class RotaryEmbedding(nn.Module):
    """Rotate-half rotary embedding, computed in fp32 whatever the type of its input.

    Both LLaDA and Dream store their query and key weights for this layout, so no weight has to be permuted.
    """

    cache: Tensor

    def __init__(self, head_dim: int, max_seq_len: int, base: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.base = base
        self.register_buffer("cache", self._table(), persistent=False)

    def reset(self) -> None:
        """Compute the table anew, in fp32, on the device it is on."""
        with self.cache.device:
            self.cache = self._table()

    def _table(self) -> Tensor:
        """Cosines and sines of every position, [max_seq_len, h]."""
        frequencies = 1.0 / (self.base ** (torch.arange(0, self.head_dim, 2).float() / self.head_dim))
        angles = torch.arange(self.max_seq_len).float()[:, None] * frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=-1)

    def forward(self, x: Tensor, input_pos: Tensor | None = None) -> Tensor:
        """Rotate queries or keys.

        Args:
            x: [B, T, heads, h].
            input_pos: int64 [B, T], position of each token in its sequence; None counts from 0 at the left edge.

        Returns:
            [B, T, heads, h], in the type of `x`.
        """
        cache = self.cache[: x.size(1)] if input_pos is None else self.cache[input_pos]
        cos, sin = cache.unsqueeze(-2).chunk(2, dim=-1)  # [B or -, T, 1, h / 2]
        first, second = x.float().view(*x.shape[:-1], 2, -1).unbind(-2)
        rotated = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-2)
        return rotated.flatten(-2).to(x.dtype)


class BidirectionalAttention(nn.Module):
    """Multi-head attention in which every token of a sequence sees all of it; grouped key/value heads allowed.

    With `bias`, the query, key and value projections have biases; all layers share one `rope`.
    """

    kernel = "sdpa"  # `choose_packed_attention` sets another
    is_compiled = False
    packed_attention: PackedAttention = staticmethod(bucketed_attention)

    def __init__(self, sizes: TransformerSizes, rope: RotaryEmbedding, *, bias: bool) -> None:
        super().__init__()
        self.head_dim = sizes.embed_dim // sizes.num_heads
        kv_dim = sizes.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(sizes.embed_dim, sizes.embed_dim, bias=bias)
        self.k_proj = nn.Linear(sizes.embed_dim, kv_dim, bias=bias)
        self.v_proj = nn.Linear(sizes.embed_dim, kv_dim, bias=bias)
        self.output_proj = nn.Linear(sizes.embed_dim, sizes.embed_dim, bias=False)
        self.pos_embeddings = rope

    def forward(self, x: Tensor, *, mask: AttentionMask = None, input_pos: Tensor | None = None) -> Tensor:
        """Self-attention.

        Args:
            x: [B, T, D].
            mask: see `AttentionMask`.
            input_pos: int64 [B, T], position of each token in its sequence.

        Returns:
            [B, T, D].
        """
        # Not `self.head_dim`: compiled for any number of tokens, a sharded layer takes its integers for unknown, too,
        # and kernels for an unknown head size are slow, or there are none. Sizes of its tables are known.
        head_dim = self.pos_embeddings.cache.size(-1)
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


class FeedForward(nn.Module):
    """SwiGLU: `w2(silu(w1(x)) * w3(x))`."""

    def __init__(self, embed_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(embed_dim, mlp_dim, bias=False)
        self.w2 = nn.Linear(mlp_dim, embed_dim, bias=False)
        self.w3 = nn.Linear(embed_dim, mlp_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to [..., D]."""
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to its input."""

    is_compiled = False

    def __init__(self, sizes: TransformerSizes, rope: RotaryEmbedding, *, attn_bias: bool) -> None:
        super().__init__()
        self.attn = BidirectionalAttention(sizes, rope, bias=attn_bias)
        self.mlp = FeedForward(sizes.embed_dim, sizes.mlp_dim)
        self.sa_norm = RMSNorm(sizes.embed_dim, eps=sizes.norm_eps)
        self.mlp_norm = RMSNorm(sizes.embed_dim, eps=sizes.norm_eps)

    def forward(
        self,
        x: Tensor,
        *,
        mask: AttentionMask = None,
        input_pos: Tensor | None = None,
        hidden_at: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the layer.

        Args:
            x: [B, T, D].
            mask: see `AttentionMask`.
            input_pos: int64 [B, T], position of each token in its sequence.
            hidden_at: int64 [m], flat positions of the tokens that are wanted; None for all.

        Returns:
            [B, T, D], or [1, m, D] with `hidden_at`.
        """
        hidden = x + self.attn(self.sa_norm(x), mask=mask, input_pos=input_pos)
        if hidden_at is not None:
            hidden = hidden.flatten(0, 1).index_select(0, hidden_at).unsqueeze(0)
        updated: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return updated

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the layer for any number of rows and tokens: in training nearly every batch has its own."""
        super().compile(*args, **{"dynamic": True, **kwargs})
        self.is_compiled = self.attn.is_compiled = True
        set_packed_attention(self, self.attn.kernel)


def init_rope(module: nn.Module) -> None:
    """Compute the rotary tables anew on the device they are on, in fp32.

    They are no weights: a module built on the meta device, or cast to another type, needs this call.
    """
    for submodule in module.modules():
        if isinstance(submodule, RotaryEmbedding):
            submodule.reset()


def choose_packed_attention(module: nn.Module, device: torch.device, compute_dtype: torch.dtype) -> str:
    """Set the kernel for packed rows on every attention of a module, once before a run.

    Args:
        module: a model or a backbone.
        device: where it is going to run.
        compute_dtype: type of queries, keys and values: that of autocast or of FSDP's mixed precision.

    Returns:
        One line that says which and why, to be logged.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    where = device.type if capability is None else "sm_{}{}".format(*capability)
    (head_dim,) = {attention.head_dim for attention in _attentions(module)}
    name = fastest_kernel(device.type, capability, compute_dtype, head_dim)
    set_packed_attention(module, name)
    return f"packed attention: {name} ({_NAMES[compute_dtype]} on {where}, head size {head_dim})"


def set_packed_attention(module: nn.Module, name: str) -> None:
    """Set a kernel for packed rows, by its name for `packed_kernel`, on every attention of a module."""
    for attention in _attentions(module):
        attention.kernel = name
        attention.packed_attention = packed_kernel(name, compiled=attention.is_compiled)


def _attentions(module: nn.Module) -> list[BidirectionalAttention]:
    return [part for part in module.modules() if isinstance(part, BidirectionalAttention)]
