"""Rules on the optimizer: what torchao's optimizers cannot do, and when a step may be part of the backward pass.

They are written like those of `_rules`.
"""

import os
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from dllm_jepa.config._rules import Launch

_OFFLOADED = ("torchao.optim.CPUOffloadOptimizer", "torchao.optim.cpu_offload.CPUOffloadOptimizer")


def low_bit_optimizer_on_sharded_bf16(optimizer: Mapping[str, Any], dtype: str, launch: Launch) -> list[str]:
    """Sharded bf16 weights and a state of few bits cannot be resumed."""
    if not _is_low_bit(optimizer) or dtype != "bf16" or launch.world_size == 1:
        return []
    return [
        f"optimizer._component_: {optimizer['_component_']} with dtype: bf16 on {launch.world_size} processes: its "
        "state cannot be loaded again for sharded bf16 weights; set dtype: fp32 with compute_dtype: bf16, or start one "
        "process"
    ]


def stochastic_round_in_one_process(optimizer: Mapping[str, Any], launch: Launch) -> list[str]:
    """The rounding of torchao mixes plain tensors with sharded ones, which torch refuses."""
    if not optimizer.get("bf16_stochastic_round") or launch.world_size == 1:
        return []
    return [
        f"optimizer.bf16_stochastic_round: true on {launch.world_size} processes: torchao cannot round sharded weights "
        "stochastically; set it to false and dtype: fp32 with compute_dtype: bf16, or start one process"
    ]


def stochastic_round_needs_bf16(optimizer: Mapping[str, Any], dtype: str) -> list[str]:
    """Weights in fp32 are not rounded."""
    if not optimizer.get("bf16_stochastic_round") or dtype == "bf16":
        return []
    return [
        f"optimizer.bf16_stochastic_round: true has no effect with dtype: {dtype}, as only bf16 weights are rounded; "
        "set it to false, or dtype: bf16"
    ]


def low_bit_optimizer_has_compiler(optimizer: Mapping[str, Any]) -> list[str]:
    """Torchao's optimizers compile their step, on a GPU, too; it takes the compiler that torch's inductor looks for."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if not _is_low_bit(optimizer) or shutil.which(compiler) or os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):
        return []
    return [
        f"optimizer._component_: {optimizer['_component_']} compiles its step and needs a C++ compiler, but there is "
        f"no {compiler!r} here; install g++ (apt-get install g++), set the environment variable CXX to another "
        "compiler, or take torch.optim.AdamW"
    ]


def no_offloaded_optimizer(optimizer: Mapping[str, Any]) -> list[str]:
    """An optimizer with weights of its own cannot be resumed."""
    component = optimizer["_component_"]
    if component not in _OFFLOADED:
        return []
    return [
        f"optimizer._component_: {component} is not offered: it keeps its own copy of the weights in main memory, with "
        "which it would overwrite the loaded ones of a resumed run, it has no state by parameter to save, and it takes "
        "the gradients before they are clipped; take torchao.optim.AdamW8bit with optimizer_in_bwd: true"
    ]


def optimizer_in_bwd_is_legal(
    optimizer_in_bwd: bool, clip_grad_norm: float | None, l2_anchor_weight: float
) -> list[str]:
    """Within the backward pass nothing can come between a gradient and its update."""
    if not optimizer_in_bwd:
        return []
    problems = []
    if clip_grad_norm is not None:
        problems.append(
            f"optimizer_in_bwd: true together with clip_grad_norm: {clip_grad_norm}, but the norm is known only after "
            "the last gradient, when the weights are updated; set clip_grad_norm: null or optimizer_in_bwd: false"
        )
    if l2_anchor_weight != 0:
        problems.append(
            f"optimizer_in_bwd: true together with l2_anchor_weight: {l2_anchor_weight}, but the anchor's gradient is "
            "added after the backward pass, when the weights are updated; set l2_anchor_weight: 0 or "
            "optimizer_in_bwd: false"
        )
    return problems


def optimizer_in_bwd_in_one_process(optimizer_in_bwd: bool, launch: Launch) -> list[str]:
    """FSDP counts on the gradients of a layer to live until the end of the backward pass."""
    if not optimizer_in_bwd or launch.world_size == 1:
        return []
    return [
        f"optimizer_in_bwd: true on {launch.world_size} processes, but FSDP reduces gradients on streams of its own "
        "and counts on them to live until the end of the backward pass; set optimizer_in_bwd: false (a process holds "
        "only its shard of the gradients), or start one process"
    ]


def _is_low_bit(optimizer: Mapping[str, Any]) -> bool:
    """Whether it is an optimizer of torchao with a step of its own."""
    component = optimizer["_component_"]
    return component.startswith("torchao.optim.") and component not in _OFFLOADED
