"""The model every backbone family builds: a bidirectional transformer, a head, and the family's logit alignment.

Shape legend: B rows, T tokens of a row, D hidden, V vocabulary, n positions to score.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import FeedForward, TransformerSelfAttentionLayer

from dllm_jepa.errors import ConfigError
from dllm_jepa.models._attention import AttentionMask, BidirectionalAttention, CastRMSNorm, RotaryEmbedding
from dllm_jepa.models._linear_cross_entropy import (
    ChunkLoss,
    Head,
    TokenLosses,
    chunk_loss,
    compiled_chunk_loss,
    linear_cross_entropy,
)
from dllm_jepa.models._lora_settings import LoRASettings
from dllm_jepa.packing import PackedSequences


@dataclass(frozen=True)
class TransformerSizes:
    """Numbers that fix an architecture.

    Args:
        vocab_size: rows of the embedding, ids without a token included.
        embed_dim: hidden size D.
        num_layers: transformer layers.
        num_heads: query heads.
        num_kv_heads: key/value heads; a divisor of `num_heads`.
        mlp_dim: width of the feed-forward layer.
        max_seq_len: longest sequence in tokens.
        rope_base: base of the rotary frequencies.
        norm_eps: epsilon of the RMSNorms.
        tie_embeddings: the head reuses the embedding.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    max_seq_len: int
    rope_base: float
    norm_eps: float
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        """Check that the sizes fit each other.

        Raises:
            ValueError: naming the two sizes that do not fit.
        """
        for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "mlp_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.embed_dim % self.num_heads or (self.embed_dim // self.num_heads) % 2:
            raise ValueError(
                f"embed_dim ({self.embed_dim}) must be an even multiple of num_heads ({self.num_heads}): "
                "rotary embeddings rotate pairs"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")


class Backbone(nn.Module):
    """Embedding, transformer layers and final norm: tokens in, hidden states out."""

    def __init__(self, sizes: TransformerSizes, *, attn_bias: bool) -> None:
        super().__init__()
        self.max_seq_len = sizes.max_seq_len
        rope = RotaryEmbedding(sizes.embed_dim // sizes.num_heads, sizes.max_seq_len, sizes.rope_base)
        self.tok_embeddings = nn.Embedding(sizes.vocab_size, sizes.embed_dim)
        self.layers = nn.ModuleList(_build_layer(sizes, rope, attn_bias) for _ in range(sizes.num_layers))
        self.norm = CastRMSNorm(sizes.embed_dim, eps=sizes.norm_eps)

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: AttentionMask = None,
        input_pos: Tensor | None = None,
        hidden_at: Tensor | None = None,
    ) -> Tensor:
        """Post-norm hidden states.

        Args:
            tokens: int64 [B, T].
            mask: see `AttentionMask`.
            input_pos: int64 [B, T], position of each token in its sequence; None counts from 0 at the left edge.
            hidden_at: int64 [m], flat positions b * T + i of the tokens whose hidden states are wanted; the last layer
                leaves out what only the others need. None for all.

        Returns:
            [B, T, D], or [1, m, D] with `hidden_at`.

        Raises:
            ValueError: if a row without `input_pos` is longer than `max_seq_len`.
        """
        if input_pos is None and tokens.size(1) > self.max_seq_len:
            raise ValueError(f"a row of {tokens.size(1)} tokens is over the model's max_seq_len of {self.max_seq_len}")
        hidden = self.tok_embeddings(tokens)  # [B, T, D]
        if self.layers[0].is_compiled and torch.is_grad_enabled():
            hidden.requires_grad_()  # of a frozen embedding, too: else the first layer is compiled for itself
        *layers, last = self.layers
        for layer in layers:
            hidden = layer(hidden, mask=mask, input_pos=input_pos)
        hidden = last(hidden, mask=mask, input_pos=input_pos, hidden_at=hidden_at)
        normed: Tensor = self.norm(hidden)
        return normed


class MaskedDiffusionLM(nn.Module):
    """A backbone with its head: hidden states, and the logits of chosen tokens only.

    Args:
        sizes: numbers of the architecture.
        family: `model_type` of the published config.json.
        shift_logits: token i is scored from hidden state i - 1 (Dream) instead of i (LLaDA). Callers always ask for
            the logits *of token i*; the shift is applied inside.
        attn_bias: query, key and value projections have biases.
    """

    def __init__(self, sizes: TransformerSizes, *, family: str, shift_logits: bool, attn_bias: bool) -> None:
        super().__init__()
        self.sizes = sizes
        self.family = family
        self.shift_logits = shift_logits
        self.lora: LoRASettings | None = None  # set by `add_lora`
        self.backbone = Backbone(sizes, attn_bias=attn_bias)
        self.head = None if sizes.tie_embeddings else Head(sizes.embed_dim, sizes.vocab_size)
        self._chunk_loss: ChunkLoss = chunk_loss

    def forward(
        self,
        tokens: Tensor,
        *,
        attention_mask: AttentionMask = None,
        input_pos: Tensor | None = None,
        logits_at: Tensor | None = None,
        labels: Tensor | None = None,
        token_weights: Tensor | None = None,
        chunk_tokens: int | None = None,
        hidden_at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | TokenLosses | None]:
        """Hidden states of all tokens, and logits of the chosen ones or, with `labels`, their losses.

        Args:
            tokens: int64 [B, T].
            attention_mask: bool or int [B, T], True or 1 at real tokens; a `PackedSequences` for a packed row
                [1, N]; a `KVCache`, which `input_pos` then gives the columns of the fed tokens; None when every token
                is real.
            input_pos: int64 [B, T], position of each token in its sequence; None counts from 0 at the left edge, pads
                included (for a packed row: from the start of each sequence).
            logits_at: int64 [n], flat positions b * T + i whose token is to be scored; None for no logits. A shifted
                model has no hidden state before the first token of a sequence and scores it, as the published code
                does, from its own. Where only some columns are fed, it needs the one before each that is scored.
            labels: int64 [n], the right tokens at `logits_at`; None for logits instead of losses.
            token_weights: fp32 [n], their weights in the loss; with `labels`.
            chunk_tokens: most tokens to score at a time, at least 1: bounds the memory of the logits; with `labels`.
            hidden_at: see `Backbone.forward`; without `logits_at`.

        Returns:
            hidden [B, T, D] (or [1, m, D], see `hidden_at`) after the final norm, and logits [n, V], `TokenLosses` or
            None.

        Raises:
            ValueError: if `labels` come without what they need, or `hidden_at` with `logits_at`.
        """
        if hidden_at is not None and logits_at is not None:
            raise ValueError("logits_at counts in all hidden states: give it without hidden_at")
        loss = None if labels is None else self._loss(logits_at, labels, token_weights, chunk_tokens)
        mask = attention_mask.bool() if isinstance(attention_mask, Tensor) else attention_mask
        if isinstance(mask, PackedSequences) and input_pos is None:
            input_pos = _packed_positions(mask, tokens.size(1))
        hidden = self.backbone(tokens, mask=mask, input_pos=input_pos, hidden_at=hidden_at)
        if logits_at is None:
            return hidden, None
        if self.shift_logits:
            logits_at = logits_at - (~_is_first(tokens, attention_mask))[logits_at].long()
        return hidden, self._score(hidden.flatten(0, 1)[logits_at], loss)

    def token_logits(self, tokens: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of every token: for generation, likelihoods and tests, never for training.

        Args:
            tokens: int64 [B, T].
            attention_mask: bool or int [B, T], True or 1 at real tokens.

        Returns:
            [B, T, V]; entry [b, i] scores token i.
        """
        everywhere = torch.arange(tokens.numel(), device=tokens.device)
        _, logits = self(tokens, attention_mask=attention_mask, logits_at=everywhere)
        assert isinstance(logits, Tensor)
        return logits.view(*tokens.shape, -1)

    def check_fits(self, *, vocab_size: int, max_seq_len: int) -> None:
        """Refuse a tokenizer or a sequence length that the model has no place for.

        Args:
            vocab_size: ids of the tokenizer.
            max_seq_len: longest sequence in tokens.

        Raises:
            ConfigError: naming the key, the value and the model's size.
        """
        if vocab_size > self.sizes.vocab_size:
            raise ConfigError(
                f"the tokenizer has ids up to {vocab_size - 1}, the model a vocab_size of only {self.sizes.vocab_size}:"
                f" set model.vocab_size to at least {vocab_size}"
            )
        if max_seq_len > self.sizes.max_seq_len:
            raise ConfigError(
                f"max_seq_len={max_seq_len} is over the model's context of {self.sizes.max_seq_len} tokens: lower it"
            )

    def architecture(self) -> dict[str, Any]:
        """What it is built from, as a training state notes it: `family`, `sizes` and, with adapters, `lora`."""
        lora = {} if self.lora is None else {"lora": asdict(self.lora)}
        return {"family": self.family, "sizes": asdict(self.sizes), **lora}

    @property
    def units(self) -> list[nn.Module]:
        """What a sharded model gathers one by one, in the order of use: the layers, and the head if there is one."""
        return [*self.backbone.layers, *([] if self.head is None else [self.head])]

    def compile_loss(self) -> None:
        """Compile what turns logits into losses and their gradient, as `compile_model` of torchtune does the layers."""
        self._chunk_loss = compiled_chunk_loss()

    def _loss(
        self, logits_at: Tensor | None, labels: Tensor, token_weights: Tensor | None, chunk_tokens: int | None
    ) -> Callable[[Tensor, Tensor], TokenLosses]:
        """The loss as a function of hidden states and the head's weight."""
        needed = {"logits_at": logits_at, "token_weights": token_weights, "chunk_tokens": chunk_tokens}
        missing = [name for name, value in needed.items() if value is None]
        if token_weights is None or chunk_tokens is None or missing:
            raise ValueError(f"labels come with {', '.join(needed)}; missing: {', '.join(missing)}")
        return partial(
            linear_cross_entropy,
            labels=labels,
            token_weights=token_weights,
            chunk_tokens=chunk_tokens,
            chunk_loss=self._chunk_loss,
        )

    def _score(self, hidden: Tensor, loss: Callable[[Tensor, Tensor], TokenLosses] | None) -> Tensor | TokenLosses:
        if self.head is not None:
            scores: Tensor | TokenLosses = self.head(hidden, loss)
            return scores
        weight = self.backbone.tok_embeddings.weight
        return F.linear(hidden, weight) if loss is None else loss(hidden, weight)


def init_rope(module: nn.Module) -> None:
    """Compute the rotary tables anew on the device they are on, in fp32.

    They are no weights: a module built on the meta device, or cast to another type, needs this call.
    """
    for submodule in module.modules():
        if isinstance(submodule, RotaryEmbedding):
            submodule.reset()


class _Layer(TransformerSelfAttentionLayer):
    """A layer that is compiled for any number of rows and tokens: in training nearly every batch has its own."""

    is_compiled = False

    def forward(  # type: ignore[override]  # the mask may be more than a tensor, and some tokens left out
        self,
        x: Tensor,
        *,
        mask: AttentionMask = None,
        input_pos: Tensor | None = None,
        hidden_at: Tensor | None = None,
    ) -> Tensor:
        """Attention and feed-forward, each added to its input: [B, T, D], or [1, m, D] of the tokens at `hidden_at`."""
        normed = self.sa_norm(x)
        hidden = x + self.attn(normed, normed, mask=mask, input_pos=input_pos)
        if hidden_at is not None:
            hidden = hidden.flatten(0, 1).index_select(0, hidden_at).unsqueeze(0)
        updated: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return updated

    def compile(self, *args: Any, **kwargs: Any) -> None:
        super().compile(*args, **{"dynamic": True, **kwargs})
        self.is_compiled = True


def _build_layer(sizes: TransformerSizes, rope: RotaryEmbedding, attn_bias: bool) -> TransformerSelfAttentionLayer:
    dim, head_dim = sizes.embed_dim, sizes.embed_dim // sizes.num_heads
    kv_dim = sizes.num_kv_heads * head_dim
    attn = BidirectionalAttention(
        embed_dim=dim,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=head_dim,
        q_proj=nn.Linear(dim, dim, bias=attn_bias),
        k_proj=nn.Linear(dim, kv_dim, bias=attn_bias),
        v_proj=nn.Linear(dim, kv_dim, bias=attn_bias),
        output_proj=nn.Linear(dim, dim, bias=False),
        pos_embeddings=rope,
        max_seq_len=sizes.max_seq_len,
        is_causal=False,
    )
    mlp = FeedForward(
        gate_proj=nn.Linear(dim, sizes.mlp_dim, bias=False),
        down_proj=nn.Linear(sizes.mlp_dim, dim, bias=False),
        up_proj=nn.Linear(dim, sizes.mlp_dim, bias=False),
    )
    return _Layer(
        attn, mlp, sa_norm=CastRMSNorm(dim, eps=sizes.norm_eps), mlp_norm=CastRMSNorm(dim, eps=sizes.norm_eps)
    )


def _packed_positions(packing: PackedSequences, num_tokens: int) -> Tensor:
    """int64 [1, N], position of every token counted from the start of its sequence."""
    row = torch.arange(num_tokens, device=packing.cu_seqlens.device)
    starts, lengths = packing.cu_seqlens[:-1].long(), packing.cu_seqlens.diff().long()
    return (row - starts.repeat_interleave(lengths, output_size=num_tokens)).unsqueeze(0)


def _is_first(tokens: Tensor, attention_mask: AttentionMask) -> Tensor:
    """Bool [B * T], True at the first token of every sequence."""
    first = torch.zeros(tokens.numel(), dtype=torch.bool, device=tokens.device)
    if isinstance(attention_mask, PackedSequences):
        first[attention_mask.cu_seqlens[:-1].long()] = True
    else:
        first[:: tokens.size(1)] = True
    return first
