"""A model whose scores a test writes down."""

import torch
from torch import Tensor


class Scripted:
    """Scores every column by a fixed table [T, V], whatever the tokens; notes what it is asked for and shown."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.asked: list[Tensor] = []
        self.seen: list[Tensor] = []

    def __call__(
        self, tokens: Tensor, *, attention_mask: Tensor | None = None, logits_at: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        assert logits_at is not None
        self.asked.append(logits_at.clone())
        self.seen.append(tokens.clone())
        return tokens, self.logits[logits_at % tokens.size(1)]


def scripted(columns: int = 16, vocab: int = 320) -> Scripted:
    return Scripted(torch.randn(columns, vocab, generator=torch.Generator().manual_seed(0)))
