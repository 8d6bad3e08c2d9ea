"""Learning-rate schedules, and the optimizer step fused into the backward pass."""

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def warmup_warning(lr_scheduler: LRScheduler | None, *, num_steps: int) -> str | None:
    """What to say of a warm-up that is longer than the run of `num_steps`, if anything; of a `LambdaLR` alone."""
    factors = lr_scheduler.lr_lambdas if isinstance(lr_scheduler, LambdaLR) else []
    if not any(all(factor(step) < factor(step + 1) for step in range(num_steps)) for factor in factors):
        return None
    return (
        f"lr_scheduler: the warm-up is longer than the run: the learning rate is still rising at step {num_steps}, the "
        "last one; lower its warm-up steps, or raise max_steps"
    )


def cosine_with_warmup(
    optimizer: Optimizer,
    *,
    num_training_steps: int,
    num_warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
) -> LambdaLR:
    """Linear warm-up, then half a cosine down to zero.

    Step s (from 0) of the warm-up has rate (s + 1) / num_warmup_steps, so that no step is wasted at rate zero.

    Args:
        optimizer: its rates are the peaks.
        num_training_steps: steps of the whole run.
        num_warmup_steps: steps of the warm-up; None takes `warmup_ratio`.
        warmup_ratio: warm-up as a fraction in [0, 1] of the run, rounded up; None is 0.03.

    Raises:
        ValueError: if a number is out of range.
    """
    if num_warmup_steps is not None and warmup_ratio is not None:
        raise ValueError(f"num_warmup_steps {num_warmup_steps} together with warmup_ratio {warmup_ratio}: give one")
    warmup_ratio = 0.03 if warmup_ratio is None else warmup_ratio
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


class OptimizerInBackward:
    """Updates every parameter as soon as its gradient is complete, and frees the gradient.

    The optimizer is stepped once per gradient, and skips the parameters without one: it can be any ordinary optimizer
    over all parameters, with its usual state, checkpoints and schedule. What is saved is the memory of all gradients
    but one; with `torch.compile`, but those of one compiled region.

    What must hold:

    - One backward pass per step, not within another as in reentrant activation checkpointing: a second micro-batch
      would meet weights that the first one has changed. A second gradient before `pop_grad_norm` is refused.
    - Nothing between backward and update: no clipping of the gradient norm, which is known only after the last
      gradient, and no gradient added afterwards, as `L2Anchor` does.
    - One process: FSDP counts on gradients to live until the end of the backward pass.
    - The optimizer treats each parameter by itself, and counts steps per parameter, as those of torch.optim (but for
      LBFGS) and torchao.optim do.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._grad_norms: dict[Tensor, Tensor] = {}
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.requires_grad:
                    param.register_post_accumulate_grad_hook(self._update)

    def pop_grad_norm(self) -> Tensor:
        """The norm over all gradients since the last call, 0-dim and fp32, as `get_total_norm` would give it."""
        in_order = (param for group in self._optimizer.param_groups for param in group["params"])
        norms = [self._grad_norms[param] for param in in_order if param in self._grad_norms]
        self._grad_norms.clear()
        return nn.utils.get_total_norm(norms)

    @torch.no_grad()
    def _update(self, param: Tensor) -> None:
        assert param.grad is not None, "the hook runs when a gradient is there"
        if param in self._grad_norms:
            raise RuntimeError(
                "a parameter got a second gradient within one step, after it was updated with the first: with the "
                "optimizer in the backward pass there is one backward pass per step"
            )
        self._grad_norms[param] = torch.linalg.vector_norm(param.grad, dtype=torch.float32)
        self._optimizer.step()
        param.grad = None
