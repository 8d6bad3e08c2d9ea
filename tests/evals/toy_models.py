"""Models whose losses are known in closed form, and a model that notes what it is asked."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dllm_jepa.models import MaskedDiffusionLM


class CountingModel(nn.Module):
    """Gives the token 1 the log-odds f(masked tokens of the row) against all other tokens together.

    The one number of each hidden state is the logit of the token 1; all other logits are 0.
    """

    shift_logits = False

    def __init__(self, log_odds: Callable[[int], float], *, mask_id: int, vocab_size: int) -> None:
        super().__init__()
        self.head = nn.Linear(1, vocab_size, bias=False)
        self.head.weight = nn.Parameter(torch.eye(vocab_size)[:, 1:2].contiguous())
        self.log_odds = log_odds
        self.mask_id = mask_id
        self.vocab_size = vocab_size

    scored_from, logits = MaskedDiffusionLM.scored_from, MaskedDiffusionLM.logits

    def forward(self, tokens: Tensor, *, attention_mask: Tensor | None) -> Tensor:
        assert attention_mask is None
        counts = (tokens == self.mask_id).sum(1).tolist()
        of_rows = torch.tensor([self.log_odds(count) + math.log(self.vocab_size - 1) for count in counts])
        return of_rows.view(-1, 1, 1).expand(*tokens.shape, 1)


class RecordingModel(nn.Module):
    """Passes everything on to a model, and keeps the rows and positions."""

    def __init__(self, model: MaskedDiffusionLM) -> None:
        super().__init__()
        self.model = model
        self.sizes, self.shift_logits = model.sizes, model.shift_logits
        self.backbone, self.head = model.backbone, model.head
        self.calls: list[tuple[Tensor, Tensor]] = []

    def forward(self, tokens: Tensor, **arguments: Any) -> Tensor:
        self.tokens = tokens
        return self.model(tokens, **arguments)

    def scored_from(self, *arguments: Any) -> Tensor:
        return self.model.scored_from(*arguments)

    def logits(self, hidden: Tensor, positions: Tensor, **arguments: Any) -> Tensor:
        self.calls.append((self.tokens, positions))
        return self.model.logits(hidden, positions, **arguments)
