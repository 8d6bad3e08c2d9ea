"""Rules on `target_encoder.float8`: what it needs of the run and of the GPU.

They are written like those of `_rules`.
"""

from collections.abc import Mapping
from typing import Any

from dllm_jepa.config._rules import Launch

# torch's products of float8, with scales by row or by tensor: Ada, Hopper and later.
_LOWEST_CAPABILITY = (8, 9)


def float8_on_gpu_in_bf16(target_encoder: Mapping[str, Any] | None, device: str, compute_dtype: str) -> list[str]:
    """The CPU has no products of float8, and results of rowwise ones are bf16."""
    if not _is_float8(target_encoder):
        return []
    if device == "cpu":
        return [
            "target_encoder.float8: true with device: cpu, but it needs a GPU of compute capability 8.9 or more (Ada, "
            "Hopper and later); set target_encoder.float8: false"
        ]
    if compute_dtype != "bf16":
        return [
            f"target_encoder.float8: true with compute_dtype: {compute_dtype}, but products of float8 give bf16; set "
            "compute_dtype: bf16 or target_encoder.float8: false"
        ]
    return []


def float8_capability(target_encoder: Mapping[str, Any] | None, device: str, launch: Launch) -> list[str]:
    """An older GPU has no products of float8."""
    if not _is_float8(target_encoder) or device != "cuda" or launch.num_gpus == 0:
        return []
    capability = _lowest_capability(launch.num_gpus)
    if capability >= _LOWEST_CAPABILITY:
        return []
    return [
        f"target_encoder.float8: true on a GPU of compute capability {capability[0]}.{capability[1]}, but it needs 8.9 "
        "or more (Ada, Hopper and later); set target_encoder.float8: false"
    ]


def float8_without_compile(target_encoder: Mapping[str, Any] | None, compile: bool) -> list[str]:
    """Warn when scaling and rounding will cost what the products save."""
    if not _is_float8(target_encoder) or compile:
        return []
    return [
        "target_encoder.float8: true with compile: false: without fused kernels, scaling and rounding of inputs and "
        "weights can take longer than float8 products save; set compile: true"
    ]


def _is_float8(target_encoder: Mapping[str, Any] | None) -> bool:
    return target_encoder is not None and target_encoder.get("float8") is True


def _lowest_capability(num_gpus: int) -> tuple[int, int]:
    """The lowest compute capability of the GPUs here, major and minor; it starts CUDA in this process."""
    import torch  # seconds to import; `dllm-jepa ls` must not pay for it

    return min(map(torch.cuda.get_device_capability, range(num_gpus)))
