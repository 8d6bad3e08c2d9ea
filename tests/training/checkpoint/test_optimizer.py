"""The optimizer's state by name, also before some parameters have had their first gradient."""

import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dllm_jepa.errors import CheckpointError
from dllm_jepa.training.checkpoint._optimizer import (
    check_rates,
    optimizer_numbers,
    optimizer_tensors,
    restore_optimizer,
)

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.1, weight_decay=0.1),
    "AdamW with a tensor rate": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.1)),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "NAdam, whose first step leaves more than zeros": lambda params: torch.optim.NAdam(params, lr=0.1),
    "Adagrad, whose state exists before any step": lambda params: torch.optim.Adagrad(params, lr=0.1),
    "with numbers in its state": lambda params: Counting(params),
}


class Counting(torch.optim.Optimizer):
    """Rates fall with the number of steps, kept as a Python number."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    state = self.state[param]
                    state["count"] = state.get("count", 0) + 1
                    param.sub_(group["lr"] / state["count"] * param.grad)


any_optimizer = pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=list(OPTIMIZERS))


def two_parts() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"always": nn.Linear(3, 2), "seldom": nn.Linear(3, 2)})


def train(module: nn.ModuleDict, optimizer: torch.optim.Optimizer, steps: range, *, look: bool = False) -> None:
    """The second part gets a gradient from step 2 on."""
    for step in steps:
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = module["always"](inputs).square().sum()
        if step >= 2:
            loss = loss + module["seldom"](inputs).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if look:
            optimizer_tensors(optimizer, module)
            optimizer_numbers(optimizer, module)


def weights(module: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in module.parameters()]


@any_optimizer
@pytest.mark.parametrize("steps_done", [0, 1, 4])
def test_a_restored_optimizer_goes_on_as_if_never_stopped(
    build: Callable[..., torch.optim.Optimizer], steps_done: int
) -> None:
    """Bit for bit, also when one part had no gradient before the stop."""
    uninterrupted = two_parts()
    train(uninterrupted, build(uninterrupted.parameters()), range(6))

    first = two_parts()
    optimizer = build(first.parameters())
    train(first, optimizer, range(steps_done))
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(optimizer, first).items()}
    numbers = json.loads(json.dumps(optimizer_numbers(optimizer, first)))

    second = two_parts()
    restored = build(second.parameters())
    restore_optimizer(restored, second, numbers)
    second.load_state_dict(first.state_dict())
    live = optimizer_tensors(restored, second)
    assert {name: tensor.shape for name, tensor in live.items()} == {name: t.shape for name, t in saved.items()}
    for name, tensor in live.items():
        tensor.copy_(saved[name])
    assert optimizer_numbers(restored, second) == optimizer_numbers(optimizer, first)
    train(second, restored, range(steps_done, 6))
    for found, expected in zip(weights(second), weights(uninterrupted), strict=True):
        assert torch.equal(found, expected)


@any_optimizer
def test_looking_at_the_state_changes_nothing(build: Callable[..., torch.optim.Optimizer]) -> None:
    undisturbed, looked_at = two_parts(), two_parts()
    train(undisturbed, build(undisturbed.parameters()), range(6))
    optimizer = build(looked_at.parameters())
    rate = optimizer.param_groups[0]["lr"]
    before = weights(looked_at)
    optimizer_tensors(optimizer, looked_at)
    assert all(torch.equal(a, b) for a, b in zip(weights(looked_at), before, strict=True))
    assert optimizer.param_groups[0]["lr"] is rate
    train(looked_at, optimizer, range(6), look=True)
    for found, expected in zip(weights(looked_at), weights(undisturbed), strict=True):
        assert torch.equal(found, expected)


def test_names_are_those_of_the_parameters() -> None:
    module = two_parts()
    optimizer = torch.optim.AdamW(module.parameters())
    train(module, optimizer, range(3))
    tensors = optimizer_tensors(optimizer, module)
    assert tensors.keys() == {
        f"{part}.{name}.{state}"
        for part in ("always", "seldom")
        for name in ("weight", "bias")
        for state in ("exp_avg", "exp_avg_sq", "step")
    }


def test_values_that_json_cannot_hold_are_named() -> None:
    module = two_parts()
    optimizer = Counting(module.parameters())
    train(module, optimizer, range(1))
    optimizer.state[module["always"].weight]["count"] = {1, 2}
    with pytest.raises(CheckpointError, match=r"Counting keeps values .*: always\.weight\.count \(set\)"):
        optimizer_numbers(optimizer, module)


def test_rates_of_another_schedule_are_refused() -> None:
    module = two_parts()
    saved = optimizer_numbers(torch.optim.SGD(module.parameters(), lr=0.1), module)
    check_rates(torch.optim.SGD(module.parameters(), lr=0.1), saved)
    with pytest.raises(CheckpointError, match=r"saved at learning rates \[0.1\], .* has come to \[0.2\]"):
        check_rates(torch.optim.SGD(module.parameters(), lr=0.2), saved)
