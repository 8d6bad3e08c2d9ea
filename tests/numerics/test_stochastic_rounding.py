"""Stochastic rounding: the rounding itself, and that bf16 weights and averages go the way of fp32 ones."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torchao.optim import AdamW8bit

from dllm_jepa.jepa._stochastic_rounding import _compiled_update, stochastic_lerp_

COUNT = 2**16
LARGEST = torch.finfo(torch.bfloat16).max


def rounded(value: float, count: int = COUNT) -> Tensor:
    """`count` times `value`, an fp32 number, rounded to bf16."""
    average = torch.zeros(count, dtype=torch.bfloat16)
    stochastic_lerp_([average], [torch.full((count,), value)], 1.0)
    return average


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# The rounding


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0.0001, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(
    "low, step", [(1.0, 2**-7), (2.0 - 2**-7, 2**-7), (2.0**-20, 2.0**-27), (2.0**-130, 2.0**-133)]
)
def test_either_neighbour_by_its_distance(low: float, step: float, share: float, sign: int) -> None:
    """Also over the end of a binade, and among subnormal numbers."""
    value = torch.tensor(low + share * step).item()
    up = (value - low) / step
    drawn = rounded(sign * value).double() * sign
    assert set(drawn.tolist()) <= {low, low + step}
    deviation = math.sqrt(up * (1 - up) / COUNT)
    assert abs((drawn == low + step).double().mean().item() - up) <= 5 * deviation


@pytest.mark.slow
def test_the_kernel_of_gpus_rounds_the_same_way() -> None:
    """Compiled, here for the CPU."""
    start, weight = torch.full((COUNT,), 0.02, dtype=torch.bfloat16), 0.004
    towards = torch.full((COUNT,), 0.05)
    exact = start[0].double() + weight * (towards[0].double() - start[0].double())
    low = start[0].double()
    step = 2.0**-13  # of bf16 between 2**-6 and 2**-5
    update, moved = _compiled_update(), start.clone()
    update(moved, towards, weight)
    up = float((exact - low) / step)
    assert 0.9 < up < 1 and set(moved.double().tolist()) == {float(low), float(low) + step}
    assert abs((moved.double() > low).double().mean().item() - up) <= 5 * math.sqrt(up * (1 - up) / COUNT)
    broken = torch.tensor([math.nan, math.inf, 1.0], dtype=torch.bfloat16)
    update(broken, torch.zeros(3), 0.5)
    assert broken.isnan().tolist() == [True, False, False] and broken[1:].tolist() == [math.inf, 0.5]


@pytest.mark.parametrize("value", [0.0, 1.0, -1.5, 2.0**-133, *(sign * LARGEST for sign in (1, -1))])
@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_what_bf16_holds_stays(value: float, weight: float) -> None:
    average = torch.full((COUNT,), value, dtype=torch.bfloat16)
    stochastic_lerp_([average], [torch.full((COUNT,), value)], weight)
    assert (average == value).all()


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, -0x7FFFFF, -0x400000, -1])
def test_nan_stays_nan(bits: int) -> None:
    """Those with the fewest and with the most bits, of both signs; 0x7FFFFFFF is the one that GPUs make."""
    average = torch.ones(COUNT, dtype=torch.bfloat16)
    stochastic_lerp_([average], [torch.full((COUNT,), bits, dtype=torch.int32).view(torch.float32)], 0.25)
    assert average.isnan().all()


@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_stays_and_is_reached_from_beyond_the_largest_number_only(sign: int) -> None:
    half_a_step_beyond = LARGEST + 2.0**119
    assert set(rounded(sign * half_a_step_beyond).tolist()) == {sign * LARGEST, sign * math.inf}
    average = torch.zeros(COUNT, dtype=torch.bfloat16)
    stochastic_lerp_([average], [torch.full((COUNT,), sign * math.inf)], 0.25)
    assert (average == sign * math.inf).all()


def test_a_seeded_run_repeats() -> None:
    first = rounded(1.001)
    assert not torch.equal(rounded(1.001), first)
    torch.manual_seed(0)
    assert torch.equal(rounded(1.001), first)


@pytest.mark.parametrize("online_dtype", [torch.float32, torch.bfloat16])
def test_sharded_tensors_are_worked_on_where_they_are(online_dtype: torch.dtype) -> None:
    plain, online = torch.randn(6, 4).bfloat16(), torch.randn(6, 4).to(online_dtype)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(plain.clone(), mesh, [Shard(0)])
        torch.manual_seed(1)
        stochastic_lerp_([sharded], [distribute_tensor(online, mesh, [Shard(0)])], 0.3)
        own = sharded.to_local().clone()
    finally:
        dist.destroy_process_group()
    before = plain.clone()
    torch.manual_seed(1)
    stochastic_lerp_([plain], [online], 0.3)
    assert torch.equal(own, plain) and not torch.equal(plain, before)


# A thousand small steps


STEPS, RATE, EMA_DECAY = 1000, 1e-5, 0.996
Trajectory = list[Tensor]


def gradients() -> Iterator[Tensor]:
    """A constant direction under the noise of small batches, the same for every run."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(4096, generator=generator)
    for _ in range(STEPS):
        yield direction + 3 * torch.randn(4096, generator=generator)


def trained(optimizer: type[torch.optim.Optimizer], dtype: torch.dtype, **arguments: Any) -> Trajectory:
    """The weights before the first and after every step."""
    start = 0.02 * torch.randn(4096, generator=torch.Generator().manual_seed(0))
    param = nn.Parameter(start.bfloat16().to(dtype))
    adam = optimizer([param], lr=RATE, **arguments)  # type: ignore[call-arg]
    path = [param.detach().clone()]
    for gradient in gradients():
        param.grad = gradient.to(dtype)
        adam.step()
        path.append(param.detach().clone())
    return path


def tracking(path: Trajectory, exact: Trajectory) -> float:
    """How much of the way from the start to the end of `exact` a run has made."""
    way, exact_way = path[-1].double() - path[0].double(), exact[-1].double() - exact[0].double()
    return (way @ exact_way / exact_way.square().sum()).item()


@pytest.fixture(scope="module")
def exact_path() -> Trajectory:
    return trained(torch.optim.AdamW, torch.float32)


def test_bf16_weights_follow_fp32_ones_with_stochastic_rounding_only(exact_path: Trajectory) -> None:
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than the steps
        stochastic = trained(AdamW8bit, torch.bfloat16, bf16_stochastic_round=True)
    assert 0.95 <= tracking(stochastic, exact_path) <= 1.05
    assert tracking(trained(torch.optim.AdamW, torch.bfloat16), exact_path) < 0.15


def test_a_bf16_average_follows_an_fp32_one_with_stochastic_rounding_only(exact_path: Trajectory) -> None:
    exact, stochastic, nearest = exact_path[0].clone(), exact_path[0].bfloat16(), exact_path[0].bfloat16()
    start = exact_path[0].clone()
    for weights in exact_path[1:]:
        exact.lerp_(weights, 1 - EMA_DECAY)
        stochastic_lerp_([stochastic], [weights], 1 - EMA_DECAY)
        nearest.lerp_(weights.bfloat16(), 1 - EMA_DECAY)
    assert 0.95 <= tracking([start, stochastic], [start, exact]) <= 1.05
    assert tracking([start, nearest], [start, exact]) < 0.2
