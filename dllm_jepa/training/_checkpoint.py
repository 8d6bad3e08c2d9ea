"""The training state on disk: tensors through torch.distributed.checkpoint, everything else as JSON.

    output_dir/checkpoints/step_00000100/
        state.json            step and schedule
        config.yaml           the resolved config
        *.distcp, .metadata   model, predictor, target encoder, optimizer, monitor, anchor

A checkpoint gets its final name only when every rank has written its part.
"""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from dllm_jepa.errors import CheckpointError
from dllm_jepa.training._ranks import Ranks

_STATE_NAME = "state.json"


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The optimizer's state tensors by parameter name, to be saved or loaded in place.

    Args:
        optimizer: an optimizer over the parameters of `module`.
        module: gives the names.

    Returns:
        `{parameter name}.{state name}` to tensor. Parameters that the optimizer has not met yet, all of them or those
        that got no gradient so far, are given the state of before their first step.
    """
    _create_missing_state(optimizer)
    return {
        f"{name}.{key}": value
        # state_dict knows the names without the wrappers of activation checkpointing.
        for name, param in module.state_dict(keep_vars=True).items()
        for key, value in optimizer.state[param].items()
    }


def save_training_state(
    directory: Path, step: int, tensors: dict[str, Tensor], scalars: dict[str, Any], config_yaml: str, ranks: Ranks
) -> Path:
    """Write a checkpoint; every rank writes its own shards.

    Args:
        directory: where the checkpoints of the run stand.
        step: optimizer steps done.
        tensors: everything with a shape; DTensors are written by their owners.
        scalars: everything else, as JSON.
        config_yaml: the resolved config.
        ranks: the ranks.

    Returns:
        The checkpoint's directory.
    """
    final = directory / f"step_{step:08d}"
    unfinished = directory / f"{final.name}.unfinished"
    if ranks.is_rank_zero:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    ranks.wait()
    with _quiet_in_one_process(ranks):
        save(tensors, checkpoint_id=unfinished, no_dist=ranks.mesh is None)
    if ranks.is_rank_zero:
        state = json.dumps({"step": step} | scalars, indent=2)
        (unfinished / _STATE_NAME).write_text(state + "\n", encoding="utf-8")
        (unfinished / "config.yaml").write_text(config_yaml, encoding="utf-8")
        unfinished.rename(final)
    ranks.wait()
    return final


def load_training_state(checkpoint: Path, tensors: dict[str, Tensor], ranks: Ranks) -> dict[str, Any]:
    """Load a checkpoint into existing tensors, in place, whatever the number of ranks that wrote it.

    Args:
        checkpoint: directory written by `save_training_state`.
        tensors: the same names as were saved.
        ranks: the ranks.

    Returns:
        The saved scalars, `step` among them.

    Raises:
        CheckpointError: if the directory is not a complete checkpoint or holds other tensors.
    """
    scalars = read_scalars(checkpoint)
    reader = FileSystemReader(checkpoint)
    saved = {
        name: tuple(entry.size)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if saved != wanted:
        names = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        lines = [f"{name}: saved {saved.get(name, 'nothing')}, needed {wanted.get(name, 'nothing')}" for name in names]
        raise CheckpointError(f"checkpoint {checkpoint} is of another run:\n  " + "\n  ".join(lines[:20]))
    with _quiet_in_one_process(ranks):
        load(tensors, storage_reader=reader, no_dist=ranks.mesh is None)
    return scalars


def read_scalars(checkpoint: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    try:
        scalars = json.loads((checkpoint / _STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{checkpoint} is not a complete training checkpoint: {error}") from None
    if not isinstance(scalars, dict) or not isinstance(scalars.get("step"), int):
        raise CheckpointError(f"{checkpoint / _STATE_NAME} names no step")
    return scalars


def list_checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in directory.glob("step_*") if path.suffix != ".unfinished")


def remove_old_checkpoints(directory: Path, keep_last: int | None) -> None:
    """Keep the newest `keep_last` checkpoints; None keeps all."""
    if keep_last is not None:
        for checkpoint in list_checkpoints(directory)[:-keep_last]:
            shutil.rmtree(checkpoint)


@contextmanager
def _quiet_in_one_process(ranks: Ranks) -> Iterator[None]:
    """Without the warning that there is no process group: one process is meant to have none."""
    with warnings.catch_warnings():
        if ranks.mesh is None:
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _create_missing_state(optimizer: Optimizer) -> None:
    # A step of rate zero on zero gradients is the one way that every optimizer offers to create its state. Other
    # parameters have no gradient between steps and are passed over.
    missing = [param for group in optimizer.param_groups for param in group["params"] if not optimizer.state.get(param)]
    if not missing:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    for param in missing:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for param in missing:
        if isinstance(count := optimizer.state[param].get("step"), Tensor):
            count.zero_()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
