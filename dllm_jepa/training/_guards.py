"""Stopping a run before it saves broken weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dllm_jepa.errors import TrainingError
from dllm_jepa.training.checkpoint import list_checkpoints

_MAX_NAMED = 64


def check_finite(
    step: int, values: Mapping[str, float], *, samples: Callable[[int], Sequence[int]], checkpoints: Path
) -> None:
    """Refuse to go on with a broken number; call before anything is saved.

    Args:
        step: step number from 0.
        values: numbers of the global batch, by name, the same on every rank.
        samples: gives the dataset indices of a step; called only when they are named.
        checkpoints: where the training states of the run stand.

    Raises:
        TrainingError: if a value is not finite; it names the step, the batch and the last training state.
    """
    if all(map(math.isfinite, values.values())):
        return
    saved, batch = list_checkpoints(checkpoints), samples(step)
    named = ", ".join(map(str, batch[:_MAX_NAMED])) + (", ..." if len(batch) > _MAX_NAMED else "")
    numbers = ", ".join(f"{name} {value}" for name, value in values.items())
    raise TrainingError(
        f"step {step + 1}: {numbers}; stopped, and nothing from this step on is saved. Dataset indices of its batch: "
        f"[{named}]. Last good checkpoint: {saved[-1] if saved else 'none'}. Look at these sequences, or try a "
        "lower rate"
    )
