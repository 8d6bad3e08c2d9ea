"""The memory of an optimizer, measured on small stand-ins for the parameters."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from dllm_jepa.memory._live_storages import LiveStorages, stored_bytes
from dllm_jepa.memory._parts import DTYPES

# Elements of a stand-in: a multiple of every block size in use, and far above the smallest tensor that is quantized.
_STAND_IN = 65_536


def optimizer_state_bytes(cfg: Any, sizes: list[int]) -> int:
    """Bytes of the optimizer's state for parameters of these many elements: that of a stand-in for each size."""
    counts = [size if size <= _STAND_IN else _STAND_IN + size % _STAND_IN for size in sizes]
    measured = {count: _step_stand_ins(cfg, [count])[0] for count in set(counts)}
    return sum(measured[count] * size // count for count, size in zip(counts, sizes, strict=True))


def optimizer_step_bytes(cfg: Any, sizes: list[int]) -> int:
    """Bytes of the temporaries of the optimizer's step.

    They are those of one parameter at a time, or of all together: what a third stand-in adds tells. Not a second one: a
    loop over parameters may hold on to what it made for the one before.
    """
    two, three = (_step_stand_ins(cfg, [_STAND_IN] * number)[1] for number in (2, 3))
    together = three - two
    return (together * sum(sizes) + (two - 2 * together) * max(sizes)) // _STAND_IN


def _step_stand_ins(cfg: Any, counts: list[int]) -> tuple[int, int]:
    """Bytes of the optimizer's state for stand-ins, and of the temporaries of its second step."""
    params = [nn.Parameter(torch.zeros(count, dtype=DTYPES[cfg.dtype])) for count in counts]
    optimizer: torch.optim.Optimizer = cfg.optimizer.build(params)
    for group in optimizer.param_groups:
        if cfg.device == "cuda" and group.get("foreach", False) is None and not group.get("fused"):
            group["foreach"] = True  # what torch takes on a GPU when nothing is said
    for param in params:
        param.grad = torch.zeros_like(param)
    with torch.compiler.set_stance("force_eager"):  # torchao compiles for minutes
        optimizer.step()
        with (storages := LiveStorages()):
            optimizer.step()
    states = [[value for value in optimizer.state[p].values() if isinstance(value, Tensor)] for p in params]
    state_bytes = sum(stored_bytes(value) for values in states for value in values)
    if quantized := [value.numel() for value in states[0] if is_traceable_wrapper_subclass(value)]:
        # Compiled, torchao's step writes to memory only its new moments, in fp32: a block has to be whole before it is
        # quantized. So says the code that inductor generates for AdamW8bit; uncompiled it takes five times as much.
        return state_bytes, sum(quantized) * torch.float32.itemsize
    return state_bytes, storages.peak
