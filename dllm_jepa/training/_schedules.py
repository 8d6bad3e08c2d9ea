"""Learning-rate schedules."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine_with_warmup(
    optimizer: Optimizer,
    *,
    num_training_steps: int,
    num_warmup_steps: int | None = None,
    warmup_ratio: float = 0.03,
) -> LambdaLR:
    """Linear warm-up, then half a cosine down to zero.

    Step s (from 0) of the warm-up has rate (s + 1) / num_warmup_steps, so that no step is wasted at rate zero.

    Args:
        optimizer: its rates are the peaks.
        num_training_steps: steps of the whole run.
        num_warmup_steps: steps of the warm-up; None takes `warmup_ratio`.
        warmup_ratio: warm-up as a fraction in [0, 1] of the run, rounded up.

    Raises:
        ValueError: if a number is out of range.
    """
    if not 0 <= warmup_ratio <= 1:
        raise ValueError(f"warmup_ratio must be in [0, 1], got {warmup_ratio}")
    if num_training_steps < 1 or (num_warmup_steps is not None and num_warmup_steps < 0):
        raise ValueError(
            f"num_training_steps must be at least 1 and num_warmup_steps at least 0, got {num_training_steps} and "
            f"{num_warmup_steps}"
        )
    warmup = math.ceil(warmup_ratio * num_training_steps) if num_warmup_steps is None else num_warmup_steps

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = (step - warmup) / max(1, num_training_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))

    return LambdaLR(optimizer, share)
