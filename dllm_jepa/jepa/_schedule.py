"""When the target branch runs, and with whom the control run compares: pure functions of the step number."""

import math

import numpy as np
import torch
from torch import Tensor


def is_jepa_step(step: int, *, jepa_every: int = 1, jepa_ratio: float | None = None) -> bool:
    """Whether the target branch runs on a step.

    Args:
        step: step number from 0.
        jepa_every: every n-th step: the n-th, the 2n-th and so on, as the collapse monitor counts.
        jepa_ratio: instead, this fraction in (0, 1] of the steps, spread evenly.
    """
    if jepa_ratio is not None:
        return math.floor((step + 1) * jepa_ratio) > math.floor(step * jepa_ratio)
    return (step + 1) % jepa_every == 0


def shuffled_partners(num_sequences: int, *, seed: int, step: int) -> Tensor:
    """For each sequence of the global batch another one, whose target it is compared with.

    One random cycle through all sequences: a permutation without a fixed point.

    Args:
        num_sequences: G >= 2, sequences of the global batch.
        seed: seed of the run.
        step: step number from 0.

    Returns:
        int64 [G].
    """
    if num_sequences < 2:
        raise ValueError(f"shuffled targets need at least 2 sequences in the global batch, got {num_sequences}")
    generator = np.random.Generator(np.random.Philox(key=[seed, 3], counter=[0, 0, 0, step]))
    cycle = generator.permutation(num_sequences)
    partners = np.empty(num_sequences, dtype=np.int64)
    partners[cycle] = np.roll(cycle, -1)
    return torch.from_numpy(partners)
