"""How the logits of masked tokens are computed: exactly, with guidance, or from kept keys and values.

Shape legend: B rows, T tokens of a row, m scored tokens of a row, n scored tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dllm_jepa.generation._canvas import Canvases
from dllm_jepa.kv_cache import KVCache

Cache = Literal["none", "prefix", "dual"]


@dataclass(frozen=True)
class StepLogits:
    """The logits of a step, kept as the model gave them: they go to fp32 in parts, which bounds the memory.

    Args:
        given: [B, m, V], in the precision of the model.
        unprompted: the same without a prompt, [B, m, V]; None without guidance.
        cfg_scale: how far to move away from them.
    """

    given: Tensor
    unprompted: Tensor | None = None
    cfg_scale: float = 0.0

    def part(self, rows: slice, columns: slice) -> Tensor:
        """The logits of some rows and columns, fp32, guided."""
        logits = self.given[rows, columns].float()
        if self.unprompted is None:
            return logits
        without = self.unprompted[rows, columns].float()
        return without + (self.cfg_scale + 1) * (logits - without)


Scorer = Callable[[Canvases, Tensor, int], StepLogits]
"""From the canvases, the columns [B, m] to score and the number of the step to their logits."""


class DenoisingModel(Protocol):
    """What decoding needs of a model."""

    @property
    def shift_logits(self) -> bool:
        """Whether a token is scored from the state before it; only asked for with a cache."""

    def __call__(
        self,
        tokens: Tensor,
        *,
        attention_mask: Tensor | KVCache | None = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of all tokens; `input_pos` is given with a cache only."""

    def logits(self, hidden: Tensor, positions: Tensor, *, attention_mask: Tensor | KVCache | None = None) -> Tensor:
        """Logits [n, V] of the tokens at the flat positions [n], from hidden states of all tokens."""


def exact_scorer(model: DenoisingModel) -> Scorer:
    """Every step feeds whole rows."""

    def score(canvases: Canvases, columns: Tensor, step: int) -> StepLogits:
        rows = canvases.rows
        return StepLogits(_logits(model, rows.tokens, columns, rows.real))

    return score


def guided_scorer(model: DenoisingModel, cfg_scale: float, mask_id: int) -> Scorer:
    """Moves the logits away from those without a prompt: every step feeds each row twice, its prompt masked once.

    Source: ML-GSAI/LLaDA, generate.py, `generate`, `cfg_scale`.
    """

    def score(canvases: Canvases, columns: Tensor, step: int) -> StepLogits:
        rows = canvases.rows
        in_prompt = torch.arange(rows.tokens.size(1), device=columns.device) < rows.lengths[:, None]
        tokens = torch.cat((rows.tokens, rows.tokens.masked_fill(in_prompt, mask_id)))
        real = None if rows.real is None else rows.real.repeat(2, 1)
        given, unprompted = _logits(model, tokens, columns.repeat(2, 1), real).chunk(2)
        return StepLogits(given, unprompted, cfg_scale)

    return score


class CachedScorer:
    """Feeds whole rows at the start of a block, and then only what a cache leaves to be fed.

    Args:
        cache: `prefix` feeds the canvas from the block on, `dual` the block alone.
        refresh: feed whole rows again every so many steps of a block; None at its start alone.

    Source: Wu et al. 2025, "Fast-dLLM" (arXiv 2505.22618), section 3.2.
    """

    def __init__(self, model: DenoisingModel, cache: Cache, refresh: int | None) -> None:
        self._model = model
        self._cache = cache
        self._refresh = refresh
        self._kept: KVCache | None = None
        self._period: tuple[tuple[int, int], int] | None = None  # block and refresh that the kept ones are from
        self._prompts: list[int] = []  # whose they are

    def __call__(self, canvases: Canvases, columns: Tensor, step: int) -> StepLogits:
        """See `Scorer`."""
        rows = canvases.rows
        # Not "every so many passes": a step without a pass in one row may be one with a pass in another.
        period = (canvases.block, 0 if self._refresh is None else step // self._refresh)
        if self._kept is None or period != self._period:
            self._kept, self._period, self._prompts = KVCache(rows.real), period, rows.prompts
            return StepLogits(_logits(self._model, rows.tokens, columns, self._kept))
        if rows.prompts != self._prompts:
            self._kept.keep([self._prompts.index(prompt) for prompt in rows.prompts])
            self._prompts = rows.prompts
        start, stop = canvases.block
        # A shifted model scores the first token of the block from the state before it.
        fed = rows.columns(start - self._model.shift_logits, rows.gen_length if self._cache == "prefix" else stop)
        at = columns - fed[:, :1]
        return StepLogits(_logits(self._model, rows.tokens.gather(1, fed), at, self._kept, input_pos=fed))


def _logits(
    model: DenoisingModel, tokens: Tensor, columns: Tensor, attention_mask: Tensor | KVCache | None, **fed: Tensor
) -> Tensor:
    """Logits [B, m, V] of the tokens in some columns [B, m] of what is fed."""
    hidden = model(tokens, attention_mask=attention_mask, **fed)
    starts = tokens.size(1) * torch.arange(len(columns), device=columns.device)
    positions = (starts[:, None] + columns).flatten()
    return model.logits(hidden, positions, attention_mask=attention_mask).view(*columns.shape, -1)
