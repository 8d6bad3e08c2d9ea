"""Weights for a model that starts from scratch."""

import hashlib
import math

import torch
from torch import Tensor, nn


class InitialWeights:
    """Random initial weights, read by parameter name.

    Every tensor depends on (seed, name, shape) alone, so any number of ranks, each reading its own rows, starts from
    the same model. Matrices are normal with standard deviation `std`; those that write into the residual stream are
    divided by sqrt(2 * num_layers), so that its variance does not grow with depth (GPT-2). Scales of norms are 1 (so is
    any other vector called weight), biases 0. Of the two matrices of a LoRA adapter the first is uniform in
    +-1/sqrt(inputs), the second 0.

    Args:
        module: module (the meta device will do) whose parameters are asked for.
        seed: seed of the run.
        num_layers: transformer layers of the module.
        std: standard deviation.
    """

    def __init__(self, module: nn.Module, *, seed: int, num_layers: int, std: float = 0.02) -> None:
        self._shapes = {name: weight.shape for name, weight in module.state_dict().items()}
        self._seed = seed
        self._std = std
        self._residual_std = std / math.sqrt(2 * num_layers)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The initial value of a parameter.

        Args:
            name: parameter name.
            rows: slice of the first dimension; None reads everything.

        Returns:
            fp32 tensor on CPU.
        """
        shape = self._shapes[name]
        if name.endswith("scale") or (name.endswith("weight") and len(shape) == 1):
            weights = torch.ones(shape)
        elif name.endswith(("bias", "lora_b.weight")):
            weights = torch.zeros(shape)
        elif name.endswith("lora_a.weight"):
            bound = 1 / math.sqrt(shape[1])
            weights = torch.empty(shape).uniform_(-bound, bound, generator=self._generator(name))
        else:
            generator = self._generator(name)
            std = self._residual_std if name.endswith(("output_proj.weight", "w2.weight")) else self._std
            weights = torch.empty(shape).normal_(0.0, std, generator=generator)
        return weights if rows is None else weights[rows]

    def fingerprint(self) -> str:
        """What these weights are."""
        return f"random, seed {self._seed}"

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
