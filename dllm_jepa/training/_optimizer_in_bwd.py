"""The optimizer step fused into the backward pass, so that the gradients never exist all at once."""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class OptimizerInBackward:
    """Updates every parameter as soon as its gradient is complete, and frees the gradient.

    The optimizer is stepped once per gradient. It skips parameters without a gradient, and at that moment only one has
    any, so that one ordinary optimizer over all parameters is enough; its state, checkpoints and schedules are as
    usual. The saving is the memory of all gradients but one, with `torch.compile` but those of one compiled region.

    What must hold:

    - One backward pass per step: a second micro-batch would meet weights that the first one has changed. A second
      gradient for a parameter before `pop_grad_norm` is refused. Reentrant activation checkpointing, which runs a
      backward pass within another, may not be used either.
    - Nothing between backward and update: no clipping of the gradient norm, which is known only after the last
      gradient, and no gradient added afterwards, as `L2Anchor` does.
    - One process: FSDP reduces gradients on streams of its own, and counts on them to live until the end of the
      backward pass.
    - The optimizer treats each parameter by itself, and counts steps per parameter, as those of torch.optim (but for
      LBFGS) and torchao.optim do.

    The learning-rate schedule is stepped after the backward pass, as usual.

    Args:
        optimizer: The optimizer; its parameters that need a gradient get a hook.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._grad_norms: dict[Tensor, Tensor] = {}
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.requires_grad:
                    param.register_post_accumulate_grad_hook(self._update)

    def pop_grad_norm(self) -> Tensor:
        """Return the norm over all gradients since the last call, 0-dim and fp32, and start anew.

        It is that of the gradients before the update, as `torch.nn.utils.get_total_norm` would give it.
        """
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
