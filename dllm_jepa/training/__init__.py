"""Machinery of a training run. It knows nothing of the method, and never receives a recipe or its config."""

from dllm_jepa.training._checkpoint import (
    list_checkpoints,
    load_training_state,
    optimizer_tensors,
    remove_old_checkpoints,
    save_training_state,
)
from dllm_jepa.training._guards import check_finite
from dllm_jepa.training._progress import MetricLogger, RunLog
from dllm_jepa.training._ranks import Ranks
from dllm_jepa.training._run_directory import RunDirectory
from dllm_jepa.training._schedules import cosine_with_warmup, load_lr_scheduler, lr_scheduler_state
from dllm_jepa.training._sharding import full_tensor, full_tensors, materialize, shard

__all__ = [
    "MetricLogger",
    "Ranks",
    "RunDirectory",
    "RunLog",
    "check_finite",
    "cosine_with_warmup",
    "full_tensor",
    "full_tensors",
    "list_checkpoints",
    "load_lr_scheduler",
    "load_training_state",
    "lr_scheduler_state",
    "materialize",
    "optimizer_tensors",
    "remove_old_checkpoints",
    "save_training_state",
    "shard",
]
