"""A model whose scores a test writes down."""

import torch
from torch import Tensor


class Scripted:
    """Scores every column by a fixed table [T, V], whatever the tokens; notes what it is asked for and shown."""

    def __init__(self, logits: Tensor) -> None:
        self.table = logits
        self.asked: list[Tensor] = []
        self.seen: list[Tensor] = []

    def __call__(self, tokens: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        self.seen.append(tokens.clone())
        return tokens

    def logits(self, hidden: Tensor, positions: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        self.asked.append(positions.clone())
        return self.table[positions % hidden.size(1)]


def scripted(columns: int = 16, vocab: int = 320) -> Scripted:
    return Scripted(torch.randn(columns, vocab, generator=torch.Generator().manual_seed(0)))
