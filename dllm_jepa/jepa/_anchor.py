"""The L2-to-base baseline: a penalty on the distance to the weights that fine-tuning started from."""

import torch
from torch import Tensor, nn


class L2Anchor:
    """w * ||theta - theta_base||^2, with its gradient added where the weights are, sharded or not.

    Args:
        module: module whose parameters are held near their present values. The copy is sharded like the module.
        weight: w > 0.
    """

    def __init__(self, module: nn.Module, *, weight: float) -> None:
        self._params = list(module.parameters())
        self._base = [param.detach().clone() for param in self._params]
        self._weight = weight

    @torch.no_grad()
    def add_gradient(self) -> Tensor:
        """Add 2 * w * (theta - theta_base) to the gradients; call once a step, after the last backward.

        Returns:
            The penalty w * ||theta - theta_base||^2, a scalar (a DTensor for sharded parameters).
        """
        total = None
        for param, base in zip(self._params, self._base, strict=True):
            distance = param - base
            squares = distance.float().square().sum()
            total = squares if total is None else total + squares
            if param.grad is not None:
                param.grad.add_(distance.to(param.grad.dtype), alpha=2 * self._weight)
        if total is None:
            raise RuntimeError("the anchored module has no parameters")
        return total * self._weight

    def tensors(self) -> dict[str, Tensor]:
        """The base weights by position, live: to be saved, or loaded in place."""
        return {str(position): base for position, base in enumerate(self._base)}
