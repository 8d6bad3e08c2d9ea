"""The model every backbone family builds: a bidirectional transformer, a head, and the family's logit alignment.

Shape legend: B rows, T tokens of a row, D hidden, V vocabulary, n positions to score.
"""

import os
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dllm_jepa.errors import ConfigError
from dllm_jepa.models._layers import AttentionMask, RMSNorm, RotaryEmbedding, TransformerLayer
from dllm_jepa.models._linear_cross_entropy import (
    ChunkLoss,
    Head,
    TokenLosses,
    chunk_loss,
    compiled_chunk_loss,
    linear_cross_entropy,
)
from dllm_jepa.models._sizes import LoRASettings, TransformerSizes
from dllm_jepa.packing import PackedSequences


class Backbone(nn.Module):
    """Embedding, transformer layers and final norm: tokens in, hidden states out."""

    def __init__(self, sizes: TransformerSizes, *, attn_bias: bool) -> None:
        super().__init__()
        self.max_seq_len = sizes.max_seq_len
        rope = RotaryEmbedding(sizes.embed_dim // sizes.num_heads, sizes.max_seq_len, sizes.rope_base)
        self.tok_embeddings = nn.Embedding(sizes.vocab_size, sizes.embed_dim)
        self.layers = nn.ModuleList(TransformerLayer(sizes, rope, attn_bias=attn_bias) for _ in range(sizes.num_layers))
        self.norm = RMSNorm(sizes.embed_dim, eps=sizes.norm_eps)

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

    def compile_layers(self) -> None:
        """Compile every layer, with the backend that the environment variable TORCH_COMPILE_BACKEND names."""
        for layer in self.layers:
            layer.compile(backend=os.environ.get("TORCH_COMPILE_BACKEND", "inductor"))

    def checkpoint_layers(self) -> None:
        """Keep only the inputs of every layer for the backward pass, which computes the rest again; compile before."""
        for number, layer in enumerate(self.layers):
            self.layers[number] = checkpoint_wrapper(layer)


class MaskedDiffusionLM(nn.Module):
    """A backbone with its head: `forward` gives hidden states, `score` and `logits` what the head makes of some.

    Args:
        sizes: numbers of the architecture.
        family: `model_type` of the published config.json.
        shift_logits: token i is scored from hidden state i - 1 (Dream) instead of i (LLaDA). Callers always ask for
            scores *of token i*; the shift is applied inside.
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
        hidden_at: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the final norm.

        Args:
            tokens: int64 [B, T].
            attention_mask: bool or int [B, T], True or 1 at real tokens; a `PackedSequences` for a packed row
                [1, N]; a `KVCache`, which `input_pos` then gives the columns of the fed tokens; None when every token
                is real.
            input_pos: int64 [B, T], position of each token in its sequence; None counts from 0 at the left edge, pads
                included (for a packed row: from the start of each sequence).
            hidden_at: see `Backbone.forward`.

        Returns:
            [B, T, D], or [1, m, D] with `hidden_at`.
        """
        mask = attention_mask.bool() if isinstance(attention_mask, Tensor) else attention_mask
        if isinstance(mask, PackedSequences) and input_pos is None:
            input_pos = _packed_positions(mask, tokens.size(1))
        hidden: Tensor = self.backbone(tokens, mask=mask, input_pos=input_pos, hidden_at=hidden_at)
        return hidden

    def score(
        self,
        hidden: Tensor,
        positions: Tensor,
        *,
        labels: Tensor,
        token_weights: Tensor,
        chunk_tokens: int,
        attention_mask: AttentionMask = None,
    ) -> TokenLosses:
        """Losses of some tokens.

        Args:
            hidden: [B, T, D], hidden states of all tokens.
            positions: int64 [n], see `scored_from`.
            labels: int64 [n], the right tokens at `positions`.
            token_weights: fp32 [n], their weights in the sum; they get no gradient.
            chunk_tokens: rows of logits that are there at any time, at least 1.
            attention_mask: what `forward` was given.

        Returns:
            The weighted sum, with gradient, and the loss of every token.
        """
        scored = self.scored_from(hidden, positions, attention_mask)
        options: Any = {"chunk_tokens": chunk_tokens, "chunk_loss": self._chunk_loss}
        if self.head is None:
            return linear_cross_entropy(scored, self.backbone.tok_embeddings.weight, labels, token_weights, **options)
        return self.head.cross_entropy(scored, labels, token_weights, **options)

    def logits(self, hidden: Tensor, positions: Tensor, *, attention_mask: AttentionMask = None) -> Tensor:
        """Logits [n, V] of some tokens; arguments as of `score`."""
        scored = self.scored_from(hidden, positions, attention_mask)
        logits: Tensor = (
            F.linear(scored, self.backbone.tok_embeddings.weight) if self.head is None else self.head(scored)
        )
        return logits

    def scored_from(self, hidden: Tensor, positions: Tensor, attention_mask: AttentionMask = None) -> Tensor:
        """The hidden states that the head scores some tokens from.

        A shifted model has no hidden state before the first token of a sequence and scores it, as the published code
        does, from its own. Where only some columns are fed, it needs the one before each that is scored.

        Args:
            hidden: [B, T, D], hidden states of all tokens.
            positions: int64 [n], flat positions b * T + i of the tokens.
            attention_mask: what `forward` was given.

        Returns:
            [n, D].
        """
        if self.shift_logits:
            is_first = _is_first(hidden, attention_mask)
            positions = positions - (~is_first[positions]).long()
        return hidden.flatten(0, 1)[positions]

    def token_logits(self, tokens: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        """Logits of every token: for generation, likelihoods and tests, never for training.

        Args:
            tokens: int64 [B, T].
            attention_mask: bool or int [B, T], True or 1 at real tokens.

        Returns:
            [B, T, V]; entry [b, i] scores token i.
        """
        hidden = self(tokens, attention_mask=attention_mask)
        everywhere = torch.arange(tokens.numel(), device=tokens.device)
        return self.logits(hidden, everywhere, attention_mask=attention_mask).view(*tokens.shape, -1)

    def check_fits(self, *, vocab_size: int, max_seq_len: int) -> None:
        """Refuse a tokenizer of so many ids, or sequences of so many tokens, if the model has no place for them.

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

    @property
    def scorer(self) -> nn.Module:
        """The module whose weights score tokens: the head or, with tied embeddings, the model itself."""
        return self if self.head is None else self.head

    def compile_layers(self) -> None:
        """Compile every layer of the backbone, and what turns logits into losses and their gradient."""
        self.backbone.compile_layers()
        self._chunk_loss = compiled_chunk_loss()

    def checkpoint_layers(self) -> None:
        """See `Backbone.checkpoint_layers`."""
        self.backbone.checkpoint_layers()


def _packed_positions(packing: PackedSequences, num_tokens: int) -> Tensor:
    """int64 [1, N], position of every token counted from the start of its sequence."""
    row = torch.arange(num_tokens, device=packing.cu_seqlens.device)
    starts, lengths = packing.cu_seqlens[:-1].long(), packing.cu_seqlens.diff().long()
    return (row - starts.repeat_interleave(lengths, output_size=num_tokens)).unsqueeze(0)


def _is_first(hidden: Tensor, attention_mask: AttentionMask) -> Tensor:
    """Bool [B * T], True at the first token of every sequence."""
    num_rows, num_tokens, _ = hidden.shape
    first = torch.zeros(num_rows * num_tokens, dtype=torch.bool, device=hidden.device)
    if isinstance(attention_mask, PackedSequences):
        first[attention_mask.cu_seqlens[:-1].long()] = True
    else:
        first[::num_tokens] = True
    return first
