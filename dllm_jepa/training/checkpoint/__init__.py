"""Training states on disk: written so that a crash loses none, read so that nothing in them is trusted."""

from dllm_jepa.training.checkpoint._directory import (
    Start,
    find_start,
    list_checkpoints,
    move_aside,
    remove_unfinished,
    step_of,
)
from dllm_jepa.training.checkpoint._manifest import MANIFEST_NAME, NewerFormatError
from dllm_jepa.training.checkpoint._optimizer import trained_tensors
from dllm_jepa.training.checkpoint._reader import SavedCheckpoint
from dllm_jepa.training.checkpoint._state import TrainingState, check_trained, compare_fingerprints, run_fingerprint
from dllm_jepa.training.checkpoint._writer import CheckpointWriter

__all__ = [
    "MANIFEST_NAME",
    "CheckpointWriter",
    "NewerFormatError",
    "SavedCheckpoint",
    "Start",
    "TrainingState",
    "check_trained",
    "compare_fingerprints",
    "find_start",
    "list_checkpoints",
    "move_aside",
    "remove_unfinished",
    "run_fingerprint",
    "step_of",
    "trained_tensors",
]
