"""LLaDA's sampler: a canvas of mask tokens behind every prompt, filled block by block, the surest tokens first.

Shape legend: B rows, T tokens of a row (prompt, canvas, padding), G tokens of a canvas, m masked tokens of a block,
V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

Remasking = Literal["low_confidence", "random"]


class DenoisingModel(Protocol):
    """What the sampler needs of a model: the second method if it is to score whole rows, else the first one."""

    def __call__(
        self, tokens: Tensor, *, attention_mask: Tensor | None = None, logits_at: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Anything, and the logits [n, V] of the tokens at the flat positions `logits_at`."""

    def token_logits(self, tokens: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; entry [b, i] scores token i."""


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Args:
        canvas: int64 [B, G], the tokens behind each prompt.
        trace: the canvas [B, G] after every step, the masks that were left included; empty unless asked for.
    """

    canvas: Tensor
    trace: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class BlockDecoding:
    """Fills the blocks of a canvas from left to right.

    Every step of a block scores its masked tokens, picks a token for each, and commits those with the highest
    confidence; a committed token stays.

    Args:
        gen_length: tokens to generate per prompt, G.
        block_length: tokens of a block, in [1, `gen_length`]; the last block may be shorter.
        steps: steps over all blocks; a multiple of the number of blocks. The tokens of a block are spread evenly over
            its steps, the first ones take the remainder, and steps without a token are left out.
        temperature: 0 takes the likeliest token; otherwise Gumbel noise in float64, scaled by this, is added first.
        remasking: `low_confidence` commits the tokens with the highest probability, `random` any.
        score_whole_rows: call `model.token_logits` on whole rows instead of the model itself with `logits_at`: the same
            tokens, with up to T / m times the work in the head.

    Raises:
        ValueError: an argument is out of range.

    Source: ML-GSAI/LLaDA, generate.py, `generate` (Nie et al. 2025, "Large Language Diffusion Models", algorithm 5).
        There all prompts have one length, and the random numbers are those of a whole [B, T, V] tensor.
    """

    gen_length: int
    block_length: int
    steps: int
    temperature: float = 0.0
    remasking: Remasking = "low_confidence"
    score_whole_rows: bool = False

    def __post_init__(self) -> None:
        """Check lengths, steps and choices."""
        if not 1 <= self.block_length <= self.gen_length:
            raise ValueError(
                f"block_length must be between 1 and gen_length ({self.gen_length}), got {self.block_length}"
            )
        if self.steps < 1 or self.steps % self._num_blocks:
            raise ValueError(f"steps must be a multiple of the number of blocks ({self._num_blocks}), got {self.steps}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")
        if self.remasking not in get_args(Remasking):
            raise ValueError(f"remasking must be one of {', '.join(get_args(Remasking))}, got {self.remasking!r}")

    @property
    def _num_blocks(self) -> int:
        return -(-self.gen_length // self.block_length)

    @torch.no_grad()
    def generate(
        self,
        model: DenoisingModel,
        prompts: Sequence[Sequence[int]],
        *,
        mask_id: int,
        pad_id: int,
        token_ids: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        trace: bool = False,
        device: torch.device | str = "cpu",
    ) -> Generation:
        """Generate for a batch of prompts of any lengths.

        At temperature 0 the result for a prompt does not depend on what else is in the batch.

        Args:
            model: the model, in evaluation mode.
            prompts: token ids, at least one per prompt.
            mask_id: id of the mask token, which is never sampled.
            pad_id: id that stands behind shorter rows; the model does not see it.
            token_ids: ids that may be sampled, those that have a token; None allows all that the model scores.
            generator: source of all random numbers, on `device`; needed for a temperature and for `random`.
            trace: keep the canvas after every step.
            device: device of the model.

        Raises:
            ValueError: a prompt is empty, or the generator is missing.
        """
        if not prompts or not all(prompts):
            raise ValueError("there must be at least one prompt, and a token in each of them")
        if generator is None and (self.temperature > 0 or self.remasking == "random"):
            raise ValueError("a generator is needed to sample at a temperature above 0 or with random remasking")
        tokens, real, canvas_at = _layout(prompts, self.gen_length, mask_id, pad_id, device)
        attention_mask = None if bool(real.all()) else real
        flat = tokens.view(-1)  # shares its memory with tokens
        snapshots = []
        for start in range(0, self.gen_length, self.block_length):
            masked = canvas_at[:, start : start + self.block_length]  # [B, m], flat positions
            for num_commits in _spread(masked.size(1), self.steps // self._num_blocks):
                logits = self._score(model, tokens, attention_mask, masked)  # [B, m, V]
                picked = self._pick(logits, mask_id, token_ids, generator)  # [B, m]
                order = self._confidence(logits, picked, generator).argsort(dim=1, descending=True, stable=True)
                committed, left = order[:, :num_commits], order[:, num_commits:].sort(dim=1).values
                flat[masked.gather(1, committed)] = picked.gather(1, committed)
                masked = masked.gather(1, left)
                if trace:
                    snapshots.append(flat[canvas_at])
        return Generation(flat[canvas_at], snapshots)

    def _score(self, model: DenoisingModel, tokens: Tensor, attention_mask: Tensor | None, masked: Tensor) -> Tensor:
        """Logits [B, m, V] of the masked tokens."""
        if self.score_whole_rows:
            return model.token_logits(tokens, attention_mask=attention_mask).flatten(0, 1)[masked]
        _, logits = model(tokens, attention_mask=attention_mask, logits_at=masked.flatten())
        assert logits is not None, "the model was asked for logits"
        return logits.view(*masked.shape, -1)

    def _pick(
        self, logits: Tensor, mask_id: int, token_ids: Sequence[int] | None, generator: torch.Generator | None
    ) -> Tensor:
        """The token [B, m] for every masked position: the likeliest of those allowed, noise included."""
        allowed = torch.zeros(logits.size(-1), dtype=torch.bool, device=logits.device)
        allowed[slice(None) if token_ids is None else list(token_ids)] = True
        allowed[mask_id] = False
        if self.temperature > 0:
            uniform = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=generator)
            # The logarithm of exp(logits) / (-log u)^temperature, so that no logit overflows. In fp32 the tail of the
            # noise would be cut, which lowers the diversity (Zheng et al. 2024, arXiv 2409.02908).
            logits = logits.double() - self.temperature * torch.log(-torch.log(uniform))
        return logits.masked_fill(~allowed, -torch.inf).argmax(-1)

    def _confidence(self, logits: Tensor, picked: Tensor, generator: torch.Generator | None) -> Tensor:
        """How sure the model is of each picked token, [B, m], without the noise; random numbers for `random`."""
        if self.remasking == "random":
            return torch.rand(picked.shape, device=logits.device, generator=generator)
        return logits.float().softmax(-1).gather(-1, picked.unsqueeze(-1)).squeeze(-1)


def _layout(
    prompts: Sequence[Sequence[int]], gen_length: int, mask_id: int, pad_id: int, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of prompt, canvas and padding: tokens [B, T], real [B, T], and flat positions of the canvases [B, G]."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    num_tokens = int(lengths.max()) + gen_length
    tokens = torch.full((len(prompts), num_tokens), pad_id, device=device)
    column = torch.arange(num_tokens, device=device)
    real = column < (lengths + gen_length)[:, None]
    tokens[real] = mask_id
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = torch.tensor(list(prompt), device=device)
    row_start = torch.arange(len(prompts), device=device) * num_tokens
    return tokens, real, (row_start + lengths)[:, None] + column[:gen_length]


def _spread(num_tokens: int, num_steps: int) -> list[int]:
    """Tokens to commit at each step, the remainder first; steps with none are left out."""
    base, remainder = divmod(num_tokens, num_steps)
    return [count for step in range(num_steps) if (count := base + (step < remainder))]
