"""Models whose losses are known in closed form, and a model that notes what it is asked."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dllm_jepa.models import MaskedDiffusionLM


class CountingModel(nn.Module):
    """Gives the token 1 the log-odds f(masked tokens of the row) against all other tokens together."""

    def __init__(self, log_odds: Callable[[int], float], *, mask_id: int, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.log_odds = log_odds
        self.mask_id = mask_id
        self.vocab_size = vocab_size

    def forward(self, tokens: Tensor, *, attention_mask: Tensor | None, logits_at: Tensor) -> tuple[None, Tensor]:
        assert attention_mask is None
        counts = (tokens == self.mask_id).sum(1)
        logits = torch.zeros(len(logits_at), self.vocab_size, dtype=torch.float64)
        for row, at in enumerate(logits_at.tolist()):
            count = int(counts[at // tokens.size(1)])
            logits[row, 1] = self.log_odds(count) + torch.tensor(self.vocab_size - 1.0).log()
        return None, logits


class RecordingModel(nn.Module):
    """Passes everything on to a model, and keeps the rows and positions."""

    def __init__(self, model: MaskedDiffusionLM) -> None:
        super().__init__()
        self.model = model
        self.sizes = model.sizes
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, tokens: Tensor, *, logits_at: Tensor, **arguments: Any) -> Any:
        self.calls.append((tokens, logits_at))
        return self.model(tokens, logits_at=logits_at, **arguments)
