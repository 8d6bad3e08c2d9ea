"""The learning rate of every step, against its formula, and after a restart."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from dllm_jepa.training import cosine_with_warmup, warmup_warning
from dllm_jepa.training.checkpoint._optimizer import replay_schedule

PEAK = 0.4


def optimizer(*, as_tensor: bool = False) -> torch.optim.Optimizer:
    return torch.optim.AdamW([nn.Parameter(torch.zeros(2))], lr=torch.tensor(PEAK) if as_tensor else PEAK)


def rates(num_training_steps: int, count: int | None = None, **arguments: Any) -> list[float]:
    """The rates that the steps of a run are made with."""
    adam = optimizer()
    scheduler = cosine_with_warmup(adam, num_training_steps=num_training_steps, **arguments)
    used = []
    for _ in range(count or num_training_steps):
        used.append(float(adam.param_groups[0]["lr"]))
        adam.step()
        scheduler.step()
    return used


@pytest.mark.parametrize(("num_training_steps", "num_warmup_steps"), [(100, 10), (7, 3), (20, 0), (20, 1), (5, 4)])
def test_every_rate(num_training_steps: int, num_warmup_steps: int) -> None:
    expected = [PEAK * (step + 1) / num_warmup_steps for step in range(num_warmup_steps)]
    left = num_training_steps - num_warmup_steps
    expected += [PEAK * (1 + math.cos(math.pi * step / left)) / 2 for step in range(left)]
    assert rates(num_training_steps, num_warmup_steps=num_warmup_steps) == pytest.approx(expected, rel=1e-9)


def test_no_step_is_wasted_at_rate_zero() -> None:
    for num_training_steps in range(1, 12):
        for num_warmup_steps in range(12):
            assert min(rates(num_training_steps, num_warmup_steps=num_warmup_steps)) > 0


def test_a_run_shorter_than_its_warm_up() -> None:
    assert rates(3, num_warmup_steps=10) == pytest.approx([0.04, 0.08, 0.12])


def test_a_warm_up_that_is_longer_than_the_run_is_said() -> None:
    for warmup, is_longer in ((0, False), (3, False), (4, True), (10, True)):
        schedule = cosine_with_warmup(optimizer(), num_training_steps=3, num_warmup_steps=warmup)
        assert (
            "the learning rate is still rising at step 3" in (warmup_warning(schedule, num_steps=3) or "")
        ) == is_longer
    assert warmup_warning(None, num_steps=3) is None
    assert warmup_warning(torch.optim.lr_scheduler.StepLR(optimizer(), 2), num_steps=3) is None


def test_past_the_end_the_rate_stays_zero() -> None:
    assert rates(6, count=12, num_warmup_steps=2)[6:] == pytest.approx([0.0] * 6, abs=1e-12)


@pytest.mark.parametrize(
    ("num_training_steps", "ratio", "warmup"),
    [(1000, None, 30), (10, None, 1), (1, None, 1), (101, 0.5, 51), (8, 0.0, 0), (8, 1.0, 8)],
)
def test_warm_up_as_a_share_is_rounded_up(num_training_steps: int, ratio: float | None, warmup: int) -> None:
    share: dict[str, Any] = {} if ratio is None else {"warmup_ratio": ratio}
    assert rates(num_training_steps, **share) == rates(num_training_steps, num_warmup_steps=warmup)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_training_steps": 0}, "num_training_steps must be at least 1 .* got 0 and None"),
        ({"num_training_steps": 5, "num_warmup_steps": -1}, "num_warmup_steps at least 0, got 5 and -1"),
        ({"num_training_steps": 5, "num_warmup_steps": 2, "warmup_ratio": 0.5}, "2 together with warmup_ratio 0.5"),
        ({"num_training_steps": 5, "warmup_ratio": 1.5}, r"warmup_ratio must be in \[0, 1\], got 1.5"),
        ({"num_training_steps": 5, "warmup_ratio": -0.5}, r"warmup_ratio must be in \[0, 1\], got -0.5"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cosine_with_warmup(optimizer(), **arguments)


SCHEDULES = {
    "cosine with warm-up": lambda optimizer: cosine_with_warmup(optimizer, num_training_steps=10, num_warmup_steps=3),
    # These two compute a rate from the one before it, so that a jump to a step would round differently.
    "cosine annealing": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=20),
}


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("steps_done", [0, 1, 5, 9])
@pytest.mark.parametrize("build", SCHEDULES.values(), ids=list(SCHEDULES))
def test_a_replayed_schedule_is_where_the_first_one_was(build: Any, steps_done: int, as_tensor: bool) -> None:
    """To the bit, rates and whatever else it moves, and in the type that the optimizer has."""
    first, second = adamw(as_tensor=as_tensor), adamw(as_tensor=as_tensor)
    scheduler = build(first)
    for _ in range(steps_done):
        first.step()
        scheduler.step()
    rate = second.param_groups[0]["lr"]
    restored = build(second)
    replay_schedule(restored, steps_done)
    assert second.param_groups[0]["lr"] is rate or not as_tensor
    for _ in range(3):
        for key, value in first.param_groups[0].items():
            assert key == "params" or second.param_groups[0][key] == value, key
        for optimizer, schedule in ((first, scheduler), (second, restored)):
            optimizer.step()
            schedule.step()


def adamw(*, as_tensor: bool) -> torch.optim.Optimizer:
    rate = torch.tensor(0.1) if as_tensor else 0.1
    return torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=rate, foreach=False)


def test_every_group_keeps_its_own_peak() -> None:
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    sgd = torch.optim.SGD([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.1}])
    cosine_with_warmup(sgd, num_training_steps=10, num_warmup_steps=4)
    assert [group["lr"] for group in sgd.param_groups] == pytest.approx([0.25, 0.025])
