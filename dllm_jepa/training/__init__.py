"""Machinery of a training run. It knows nothing of the method, and never receives a recipe or its config."""

from dllm_jepa.training._facts import compare_facts, run_facts
from dllm_jepa.training._lock import locked
from dllm_jepa.training._optimizer_in_bwd import OptimizerInBackward
from dllm_jepa.training._progress import MetricLogger, RunLog, build_metric_logger, build_profiler
from dllm_jepa.training._ranks import Ranks
from dllm_jepa.training._run_directory import RunDirectory, saved_states
from dllm_jepa.training._schedules import build_lr_scheduler, cosine_with_warmup
from dllm_jepa.training._sharding import full_tensor, full_tensors, materialize, shard
from dllm_jepa.training._signals import STOPPED_EXIT_CODE, Stopped, StopSignals
from dllm_jepa.training.checkpoint import (
    MANIFEST_NAME,
    CheckpointWriter,
    SavedCheckpoint,
    TrainingState,
    check_trained,
    list_checkpoints,
    trained_tensors,
)

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
    "build_lr_scheduler",
    "build_metric_logger",
    "build_profiler",
    "check_trained",
    "compare_facts",
    "cosine_with_warmup",
    "full_tensor",
    "full_tensors",
    "list_checkpoints",
    "locked",
    "materialize",
    "run_facts",
    "saved_states",
    "shard",
    "trained_tensors",
]
