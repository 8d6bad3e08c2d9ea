"""The state of an optimizer by parameter name: what is a tensor, and what is a number."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dllm_jepa.errors import CheckpointError


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, live, by name; not those that stay what they were, such as the base of LoRA."""
    # state_dict knows the names without the wrappers of activation checkpointing.
    return {name: param for name, param in module.state_dict(keep_vars=True).items() if param.requires_grad}


def optimizer_tensors(optimizer: Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """The tensors of an optimizer's state, live, by `{parameter name}.{state name}`; the module gives the names."""
    return {name: value for name, value in _states(optimizer, module) if isinstance(value, Tensor)}


def optimizer_numbers(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """What an optimizer knows beside its tensors, as JSON can hold it.

    Returns:
        `groups`: the options of each parameter group, rates among them; `state`: the numbers of its state, named like
        `optimizer_tensors`; `met`: the parameters that have a state.

    Raises:
        CheckpointError: if a value of its state is neither a tensor nor a number.
    """
    numbers = {name: value for name, value in _states(optimizer, module) if not isinstance(value, Tensor)}
    if strange := [name for name, value in numbers.items() if not isinstance(value, (int, float, str, type(None)))]:
        kinds = ", ".join(f"{name} ({type(numbers[name]).__name__})" for name in strange[:5])
        raise CheckpointError(
            f"{type(optimizer).__name__} keeps values that a checkpoint cannot hold: {kinds}; only tensors and numbers "
            "are stored. Take another optimizer, or set checkpoint.every_n_steps: null"
        )
    return {
        "groups": [
            {key: _plain(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ],
        "state": numbers,
        "met": [name for name, param in trained_tensors(module).items() if optimizer.state.get(param)],
    }


def restore_optimizer(optimizer: Optimizer, module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Bring a fresh optimizer into the shape of a saved one; its tensors are then to be loaded in place.

    Options such as rates stay those that the optimizer was built with. The parameters may change: load them afterwards.
    """
    _create_state(optimizer)
    for name, param in trained_tensors(module).items():
        if name not in saved["met"]:
            optimizer.state.pop(param, None)
            continue
        for key in optimizer.state[param]:
            if f"{name}.{key}" in saved["state"]:
                optimizer.state[param][key] = saved["state"][f"{name}.{key}"]


def replay_schedule(scheduler: LRScheduler, steps: int) -> None:
    """Bring a fresh schedule, and the rates of its optimizer, to where it was after so many steps.

    Taking the steps again instead of storing the schedule's own state gives the same rates to the bit for every kind
    of schedule, and is right when the config has another one.
    """
    with warnings.catch_warnings():
        # torch sees no optimizer step between these; they were taken by the saved run.
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
        for _ in range(steps):
            scheduler.step()


def check_rates(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Refuse rates that are not the saved ones."""
    rates = [_plain(group["lr"]) for group in optimizer.param_groups]
    expected = [group["lr"] for group in saved["groups"]]
    if rates != expected:
        raise CheckpointError(
            f"the checkpoint was saved at learning rates {expected}, and the config's schedule has come to {rates}: "
            "the schedule is not the one of the saved run. resume_override=true goes on with it"
        )


def _states(optimizer: Optimizer, module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, param in trained_tensors(module).items():
        for key, value in optimizer.state.get(param, {}).items():
            yield f"{name}.{key}", value


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _create_state(optimizer: Optimizer) -> None:
    """Take a step of rate zero on zero gradients: the one way that every optimizer offers to create its state."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for param in group["params"]:
            param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
