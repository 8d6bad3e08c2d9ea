"""How many tokens a step commits: planned from the tokens that are left, or read off the confidences.

A schedule plans for every row by itself, before the model is asked; its last step leaves nothing over. A speed-up looks
at the confidences and may commit more than planned.

Shape legend: B rows, m scored tokens of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Schedule(Protocol):
    """Plans the steps of one block."""

    @property
    def steps(self) -> int:
        """Steps of a block at most."""

    @property
    def is_random(self) -> bool:
        """Whether `plan` draws random numbers."""

    def plan(self, left: Sequence[int], step: int, generators: Sequence[torch.Generator]) -> list[int]:
        """Tokens to commit in each row at one step: in [0, left], and all that are left at the last step.

        Args:
            left: masked tokens of the block in each row.
            step: number of the step, in [0, `steps`).
            generators: random numbers of each row; empty where nothing is random.
        """


class SpeedUp(Protocol):
    """Commits more than planned where the model is sure."""

    def may_commit(self, confidence: Tensor) -> Tensor:
        """Which tokens may be committed at once, whatever was planned: the first ones of each row, all of them masked.

        The confidences, fp32 [B, m], fall from left to right; they are -inf for tokens that are not masked.
        """


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1 for every block, got {steps}")


@dataclass(frozen=True)
class EvenSpread:
    """The same number of tokens at every step; the first steps take the remainder.

    Args:
        steps: steps of a block, at least 1; those after the last token are left out.

    Source: ML-GSAI/LLaDA, generate.py, `get_num_transfer_tokens`.
    """

    steps: int
    is_random: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the number of steps."""
        _check_steps(self.steps)

    def plan(self, left: Sequence[int], step: int, generators: Sequence[torch.Generator]) -> list[int]:
        """See `Schedule`."""
        return [-(-num_left // (self.steps - step)) for num_left in left]


@dataclass(frozen=True)
class NoiseLevels:
    """The tokens between two noise levels, which fall from 1 to `eps` in equal steps.

    Args:
        steps: steps of a block, at least 1.
        eps: last noise level, in (0, 1).
        independently: every token is committed by chance, independently of the others; otherwise the expected number
            is, rounded down.

    Source: DreamLM/Dream, generation_utils.py, `_sample`; there with the mean of a batch in place of a row's tokens.
    """

    steps: int
    eps: float = 1e-3
    independently: bool = False

    def __post_init__(self) -> None:
        """Check steps and eps."""
        _check_steps(self.steps)
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must be in (0, 1), got {self.eps}")

    @property
    def is_random(self) -> bool:
        """See `Schedule`."""
        return self.independently

    def plan(self, left: Sequence[int], step: int, generators: Sequence[torch.Generator]) -> list[int]:
        """See `Schedule`."""
        if step == self.steps - 1:
            return list(left)
        levels = torch.linspace(1, self.eps, self.steps + 1)
        share = 1 - levels[step + 1] / levels[step]  # in fp32, as published: it decides what is rounded down to what
        if self.independently:
            return [
                int((torch.rand(num_left, generator=generator, device=generator.device) < share.item()).sum())
                for num_left, generator in zip(left, generators, strict=True)
            ]
        return [int(num_left * share) for num_left in left]


@dataclass(frozen=True)
class Threshold:
    """All tokens of at least this confidence.

    Args:
        threshold: a probability, in (0, 1].

    Source: Wu et al. 2025, "Fast-dLLM" (arXiv 2505.22618), section 3.3.
    """

    threshold: float

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold}")

    def may_commit(self, confidence: Tensor) -> Tensor:
        """See `SpeedUp`."""
        return confidence >= self.threshold


@dataclass(frozen=True)
class Factor:
    """The largest n for which (n + 1) * (1 - c) < factor, with c the n-th highest confidence.

    Args:
        factor: above 0; the higher, the more tokens at once.

    Source: Wu et al. 2025, "Fast-dLLM" (arXiv 2505.22618), section 3.3, factor-based parallel decoding.
    """

    factor: float

    def __post_init__(self) -> None:
        """Check the range."""
        if not self.factor > 0:
            raise ValueError(f"factor must be above 0, got {self.factor}")

    def may_commit(self, confidence: Tensor) -> Tensor:
        """See `SpeedUp`."""
        number = torch.arange(1, confidence.size(1) + 1, device=confidence.device)
        # Confidences fall, so the left side rises with n: what holds for n holds for all before it.
        return (number + 1) * (1 - confidence) < self.factor
