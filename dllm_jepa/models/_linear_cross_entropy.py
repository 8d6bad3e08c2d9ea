"""The head and the cross-entropy of masked tokens as one function, computed for a chunk of tokens at a time.

The weights of the tokens in the loss are known before the forward pass, so that each chunk of logits is turned into its
gradient at once and then dropped: no logits are kept for the backward pass, and none are computed twice.

Shape legend: n scored tokens, c tokens of a chunk, D hidden, V vocabulary.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

ChunkLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""See `chunk_loss`."""


class TokenLosses(NamedTuple):
    """Losses of scored tokens.

    Args:
        weighted_sum: fp32 scalar, the sum of weight times loss; the gradient flows through it.
        per_token: fp32 [n], -log p of each token's label; without gradient.
    """

    weighted_sum: Tensor
    per_token: Tensor


class Head(nn.Linear):
    """The layer from hidden states to logits, and from hidden states to losses without ever holding all logits."""

    forward_methods = ("cross_entropy",)  # see `training.shard`

    def __init__(self, embed_dim: int, vocab_size: int) -> None:
        super().__init__(embed_dim, vocab_size, bias=False)

    def cross_entropy(self, hidden: Tensor, labels: Tensor, token_weights: Tensor, **options: Any) -> TokenLosses:
        """`linear_cross_entropy` with the weight of the head."""
        return linear_cross_entropy(hidden, self.weight, labels, token_weights, **options)


def chunk_loss(logits: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
    """Losses of a chunk of tokens; the logits are overwritten with the gradient of the weighted sum.

    Both are computed in fp32 or, for fp64 logits, in fp64. In place and with one exponential per logit, because the
    passes over the logits are what this costs.

    Args:
        logits: [c, V]; afterwards the gradient, weight * (softmax - one-hot).
        labels: int64 [c], in [0, V).
        token_weights: fp32 [c].

    Returns:
        fp32 [c], -log p of each label.
    """
    at_label, weights = labels[:, None], token_weights[:, None]
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    highest = scores.amax(1, keepdim=True)
    label_score = scores.gather(1, at_label) - highest
    exps = scores.sub_(highest).exp_()
    total = exps.sum(1, keepdim=True)
    label_log_prob = label_score - total.log()
    gradient = exps.mul_(weights / total).scatter_(1, at_label, weights * label_log_prob.expm1())
    logits.copy_(gradient)
    return -label_log_prob.squeeze(1)


def compiled_chunk_loss() -> ChunkLoss:
    """`chunk_loss`, compiled for any number of tokens, with the backend of `Backbone.compile_layers`."""
    backend = os.environ.get("TORCH_COMPILE_BACKEND", "inductor")
    compiled: ChunkLoss = torch.compile(chunk_loss, dynamic=True, fullgraph=True, backend=backend)
    return compiled


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    chunk_tokens: int,
    chunk_loss: ChunkLoss = chunk_loss,
) -> TokenLosses:
    """Cross-entropy of `hidden @ weight.T`, of which no more than `chunk_tokens` rows are there at any time.

    Gradients are computed in the forward pass and wait for the backward pass, which only scales them; they have the
    types of their inputs, in which that of the weight is also added up over the chunks. Under autocast the products are
    computed in its type; otherwise both inputs must have one type, as for nn.Linear.

    Args:
        hidden: [n, D], hidden states to score; n may be 0, and then the gradients are zeros.
        weight: [V, D], weight of the head.
        labels: int64 [n], the right tokens, in [0, V).
        token_weights: fp32 [n], constants: they get no gradient.
        chunk_tokens: most tokens to score at a time, at least 1.
        chunk_loss: computes losses and gradient of a chunk; by default eagerly.

    Returns:
        Weighted sum and losses of the tokens.

    Raises:
        ValueError: if `chunk_tokens` is below 1, or the types differ without autocast.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    with _without_autocast(hidden.device.type) as autocast_dtype:
        dtype = autocast_dtype or weight.dtype
        if autocast_dtype is None and hidden.dtype != dtype:
            raise ValueError(f"hidden states in {hidden.dtype} and a head in {dtype}: without autocast, give one type")
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            arguments = (hidden, weight, labels, token_weights, dtype, chunk_tokens, chunk_loss)
            return TokenLosses(*_LinearCrossEntropy.apply(*arguments))  # type: ignore[no-untyped-call]
        weight, per_token = weight.to(dtype), _empty_losses(hidden)
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = F.linear(hidden[rows].to(dtype), weight)
            per_token[rows] = F.cross_entropy(logits.to(per_token.dtype), labels[rows], reduction="none")
        return TokenLosses((token_weights * per_token).sum(), per_token)


class _LinearCrossEntropy(torch.autograd.Function):
    """Scores, and has the gradients ready; products are computed in `dtype`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        token_weights: Tensor,
        dtype: torch.dtype,
        chunk_tokens: int,
        chunk_loss: ChunkLoss,
    ) -> tuple[Tensor, Tensor]:
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        if d_weight is not None and not len(hidden):
            d_weight.zero_()
        per_token, cast_weight = _empty_losses(hidden), weight.to(dtype)
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunk = hidden[rows].to(dtype)
            logits = F.linear(chunk, cast_weight)
            per_token[rows] = chunk_loss(logits, labels[rows], token_weights[rows])
            d_logits = logits
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ cast_weight
            if d_weight is not None:
                _add_product(d_weight, d_logits.t(), chunk, keep=start > 0)
            del logits, d_logits  # before the next ones are there
        ctx.mark_non_differentiable(per_token)
        ctx.set_materialize_grads(False)
        ctx.gradients = (d_hidden, d_weight)
        return (token_weights * per_token).sum(), per_token

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_sum: Tensor, _: None) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("a second backward pass through the same losses: the first one used up their gradients")
        # Let go of here, so that the gradient of a leaf is taken over and not copied.
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if gradient is None else gradient.mul_(d_sum) for gradient in gradients), *5 * [None]


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, keep: bool) -> None:
    """Add `a @ b` to what is kept of a sum of the same or a wider type; without it, the sum is not even read."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=float(keep))
    elif keep:
        total.add_(a @ b)
    else:
        total.copy_(a @ b)


def _empty_losses(hidden: Tensor) -> Tensor:
    """Memory [n] for the losses, in the type in which they are computed."""
    return hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))


@contextmanager
def _without_autocast(device_type: str) -> Iterator[torch.dtype | None]:
    """Switch autocast off; gives the type that it computes products in, or None if it was off."""
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        yield None
        return
    dtype = torch.get_autocast_dtype(device_type)
    with torch.autocast(device_type, enabled=False):
        yield dtype
