"""Machinery of a training run. It knows nothing of the method, and never receives a recipe or its config."""

from typing import TYPE_CHECKING, Any

from dllm_jepa.training._lock import locked
from dllm_jepa.training._optimizers import OptimizerInBackward, cosine_with_warmup, warmup_warning
from dllm_jepa.training._ranks import Ranks
from dllm_jepa.training._run_directory import RunDirectory, saved_states
from dllm_jepa.training._run_log import MetricLogger, RunLog, build_metric_logger, build_profiler
from dllm_jepa.training._signals import STOPPED_EXIT_CODE, Stopped, StopSignals
from dllm_jepa.training.checkpoint import (
    MANIFEST_NAME,
    CheckpointWriter,
    SavedCheckpoint,
    TrainingState,
    check_trained,
    compare_fingerprints,
    list_checkpoints,
    run_fingerprint,
    trained_tensors,
)

if TYPE_CHECKING:
    from dllm_jepa.training._sharding import full_tensor, full_tensors, materialize, shard

__all__ = [
    "MANIFEST_NAME",
    "STOPPED_EXIT_CODE",
    "CheckpointWriter",
    "MetricLogger",
    "OptimizerInBackward",
    "Ranks",
    "RunDirectory",
    "RunLog",
    "SavedCheckpoint",
    "StopSignals",
    "Stopped",
    "TrainingState",
    "build_metric_logger",
    "build_profiler",
    "check_trained",
    "compare_fingerprints",
    "cosine_with_warmup",
    "full_tensor",
    "full_tensors",
    "list_checkpoints",
    "locked",
    "materialize",
    "run_fingerprint",
    "saved_states",
    "shard",
    "trained_tensors",
    "warmup_warning",
]


def __getattr__(name: str) -> Any:
    """What needs torch.distributed.tensor, which takes half as long to import as torch itself, when it is used."""
    if name in ("full_tensor", "full_tensors", "materialize", "shard"):
        from dllm_jepa.training import _sharding

        return getattr(_sharding, name)
    raise AttributeError(f"module {__name__} has no attribute {name}")
