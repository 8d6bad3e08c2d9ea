"""Weights for a model that starts from scratch."""

import hashlib
import math

import torch
from torch import Tensor, nn


class InitialWeights:
    """Random initial weights, read by parameter name.

    Every tensor depends on (seed, name, shape) alone, so any number of ranks, each reading its own rows, starts from
    the same model. Matrices are normal with standard deviation `std`; those that write into the residual stream are
    divided by sqrt(2 * layers), so that its variance does not grow with depth (GPT-2). Scales of norms are 1 (so is
    any other vector called weight), biases 0. Of the two matrices of a LoRA adapter the first is uniform in
    +-1/sqrt(inputs), the second 0.

    Args:
        module: module (the meta device will do) whose parameters are asked for.
        seed: seed of the run.
        std: standard deviation.
    """

    def __init__(self, module: nn.Module, *, seed: int, std: float = 0.02) -> None:
        self._shapes = {name: weight.shape for name, weight in module.state_dict().items()}
        self._seed = seed
        self._std = std
        num_layers = sum(name.endswith("w2.weight") for name in self._shapes)
        self._residual_std = std / math.sqrt(2 * max(num_layers, 1))

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The initial value of a parameter, or of a slice of its first dimension: fp32, on the CPU."""
        shape = self._shapes[name]
        if name.endswith("scale") or (name.endswith("weight") and len(shape) == 1):
            weights = torch.ones(shape)
        elif name.endswith(("bias", "lora_b.weight")):
            weights = torch.zeros(shape)
        elif name.endswith("lora_a.weight"):
            bound = 1 / math.sqrt(shape[1])
            weights = torch.empty(shape).uniform_(-bound, bound, generator=self._generator(name))
        else:
            std = self._residual_std if name.endswith(("output_proj.weight", "w2.weight")) else self._std
            weights = torch.empty(shape).normal_(0.0, std, generator=self._generator(name))
        return weights if rows is None else weights[rows]

    def fingerprint(self) -> str:
        """What these weights are."""
        return f"random, seed {self._seed}"

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
