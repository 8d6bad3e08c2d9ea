"""The memory of a training step.

What lasts from step to step is counted from the shapes of parameters on the meta device; the optimizer's state is
measured on stand-ins, and a micro-batch simulated.

Not counted: the CUDA context and the workspaces of its libraries (about 1 GiB), what the allocator loses to
fragmentation, and rotary tables, inputs and the monitor's buffer (megabytes).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dllm_jepa.memory._simulation import (
    LiveStorages,
    build_parts,
    micro_batch_peak,
    optimizer_state_bytes,
    optimizer_step_bytes,
    stored_bytes,
)
from dllm_jepa.models import DTYPES, MaskedDiffusionLM

_ALWAYS = ("EMA target encoder", "gradients", "optimizer state", "activations", "logits")


@dataclass(frozen=True)
class MemoryTable:
    """Bytes on one GPU.

    Args:
        trained_weights: weights of the online model that have gradients.
        frozen_weights: those that have none.
        target_encoder: the moving average.
        gradients: of the online model; with the optimizer in the backward pass the largest one alone.
        optimizer_state: for the online model.
        predictor: its weights, gradients and optimizer state together.
        anchor: the copy of the initial weights that `l2_anchor_weight` needs.
        gathered: weights that FSDP holds gathered, and gradients that it has not reduced yet.
        activations: all that comes and goes within a micro-batch, without the head and its loss.
        logits: what the head and its loss add to the peak: a chunk of logits, and the head's gradient.
        optimizer_step: temporaries of the optimizer's step, when activations and gathered weights are gone; with the
            optimizer in the backward pass they are among the activations.
    """

    trained_weights: int
    frozen_weights: int
    target_encoder: int
    gradients: int
    optimizer_state: int
    predictor: int
    anchor: int
    gathered: int
    activations: int
    logits: int
    optimizer_step: int

    @property
    def lasting(self) -> int:
        """What is there all the time."""
        model = self.trained_weights + self.frozen_weights + self.gradients + self.optimizer_state
        return model + self.target_encoder + self.predictor + self.anchor

    @property
    def total(self) -> int:
        """The peak: of the micro-batch or of the optimizer's step."""
        return self.lasting + max(self.gathered + self.activations + self.logits, self.optimizer_step)

    def rows(self) -> list[tuple[str, int]]:
        """Names and bytes; a row that only some runs have is left out where it is zero."""
        rows = [
            ("weights" if self.frozen_weights == 0 else "weights, trained", self.trained_weights),
            ("weights, frozen", self.frozen_weights),
            ("EMA target encoder", self.target_encoder),
            ("gradients", self.gradients),
            ("optimizer state", self.optimizer_state),
            ("predictor with its gradients and optimizer state", self.predictor),
            ("initial weights of the L2 anchor", self.anchor),
            ("gathered layers (FSDP)", self.gathered),
            ("activations", self.activations),
            ("logits", self.logits),
        ]
        if self.optimizer_step > self.gathered + self.activations + self.logits:
            rows = [*rows[:7], ("optimizer step, after the activations are gone", self.optimizer_step)]
        return [(name, size) for name, size in rows if size or name in _ALWAYS] + [("total", self.total)]


def step_memory(cfg: Any, num_gpus: int = 1) -> MemoryTable:
    """The peak memory of a training step on each of the GPUs of a run.

    Args:
        cfg: checked config of a training recipe.
        num_gpus: a multiple of `data_parallel_replicate_dim`.
    """
    num_shards = num_gpus // cfg.data_parallel_replicate_dim
    model, predictor = build_parts(cfg)
    dtype, compute_dtype = DTYPES[cfg.dtype], DTYPES[cfg.compute_dtype]
    trained = _shard_sizes((param for param in model.parameters() if param.requires_grad), num_shards)
    frozen = [param for param in model.parameters() if not param.requires_grad]
    aligned = [] if predictor is None else _shard_sizes(predictor.parameters(), num_shards)
    in_backward = cfg.optimizer_in_bwd
    gradients = (max([*trained, *aligned]) if in_backward else sum(trained)) * dtype.itemsize
    kept_gradients = 0 if in_backward else sum(aligned) * dtype.itemsize
    quantized = [param for param in frozen if is_traceable_wrapper_subclass(param)]
    dense = [param for param in frozen if not is_traceable_wrapper_subclass(param)]
    backbone = micro_batch_peak(cfg, num_gpus, with_logits=False)
    whole = micro_batch_peak(cfg, num_gpus, with_logits=True)
    seen_gradient = gradients if in_backward else 0  # the simulation has it, and it has its own row
    return MemoryTable(
        trained_weights=sum(trained) * dtype.itemsize,
        frozen_weights=sum(_shard_sizes(dense, num_shards)) * compute_dtype.itemsize
        + sum(-(-stored_bytes(param) // num_shards) for param in quantized),
        target_encoder=_target_encoder_bytes(cfg, model, num_shards),
        gradients=gradients,
        optimizer_state=optimizer_state_bytes(cfg, trained),
        predictor=sum(aligned) * dtype.itemsize + kept_gradients + optimizer_state_bytes(cfg, aligned),
        anchor=sum(trained) * dtype.itemsize if cfg.l2_anchor_weight > 0 else 0,
        gathered=_gathered_bytes(cfg, model, predictor) if num_gpus > 1 else 0,
        activations=max(backbone - seen_gradient, 0) + _dequantized_bytes(quantized),
        logits=whole - backbone,
        optimizer_step=0 if in_backward else optimizer_step_bytes(cfg, [*trained, *aligned]),
    )


def _shard_sizes(params: Iterable[Tensor], num_shards: int) -> list[int]:
    """Elements that the first rank holds of every parameter: of the rows, rounded up, one share."""
    return [-(-param.size(0) // num_shards) * math.prod(param.shape[1:]) for param in params]


def _target_encoder_bytes(cfg: Any, model: MaskedDiffusionLM, num_shards: int) -> int:
    if cfg.jepa_weight == 0:
        return 0
    if all(param.requires_grad for param in model.parameters()):
        dtype = DTYPES[cfg.target_encoder.argument("dtype") or "fp32"]
        return sum(_shard_sizes(model.backbone.parameters(), num_shards)) * dtype.itemsize
    adapters = (param for param in model.backbone.parameters() if param.requires_grad)
    return sum(_shard_sizes(adapters, num_shards)) * torch.float32.itemsize


def _gathered_bytes(cfg: Any, model: MaskedDiffusionLM, predictor: nn.Module | None) -> int:
    """What FSDP holds besides the shards, in the compute type; an upper bound.

    The root's own weights (embedding and norm) through the whole micro-batch; of the layers the one at work and the
    next; and of the unit for which that is most, its gradient with the fp32 copy that is sent. With that of the head or
    the predictor come its weights, too: the head's are gathered from the last layer's forward to that layer's backward.
    """
    layers = [list(layer.parameters()) for layer in model.backbone.layers]
    others = [list(module.parameters()) for module in (model.head, predictor) if module is not None]
    inside = {id(param) for unit in (*layers, *others) for param in unit}
    root = [param for param in model.parameters() if id(param) not in inside]
    width = DTYPES[cfg.compute_dtype].itemsize

    def weights(params: list[nn.Parameter]) -> int:
        return sum(stored_bytes(p) if is_traceable_wrapper_subclass(p) else p.numel() * width for p in params)

    def unreduced(params: list[nn.Parameter]) -> int:
        return sum(param.numel() for param in params if param.requires_grad) * (width + torch.float32.itemsize)

    largest = max(*map(unreduced, (root, *layers)), *(weights(unit) + unreduced(unit) for unit in others))
    return weights(root) + 2 * max(map(weights, layers)) + largest


def _dequantized_bytes(quantized: list[nn.Parameter]) -> int:
    """Temporaries while the largest quantized weight is turned back, by the bytes per element of a small one."""
    if not quantized:
        return 0
    from torchao.dtypes.nf4tensor import to_nf4  # takes longer to import than torch

    weight = to_nf4(torch.ones(512, 512, dtype=torch.bfloat16))
    with (storages := LiveStorages()):
        weight.get_original_weight()
    largest = max(param.numel() for param in quantized)
    return storages.peak * largest // int(weight.numel())
