"""Signs of collapse: closed forms of the two figures, and a buffer that holds exactly the last rows of the stream."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dllm_jepa.jepa import MONITOR_ROWS, CollapseMonitor, cosine_diversity, effective_rank


def with_singular_values(values: list[float], rows: int, dim: int) -> Tensor:
    """A centred matrix [rows, dim] with the given singular values."""
    generator = np.random.default_rng(0)
    raw = generator.standard_normal((rows, len(values)))
    left, _ = np.linalg.qr(raw - raw.mean(0))
    right, _ = np.linalg.qr(generator.standard_normal((dim, len(values))))
    return torch.from_numpy(left @ np.diag(values) @ right.T)


@pytest.mark.parametrize("num_directions", [1, 2, 5, 16])
def test_equal_orthogonal_directions_count_one_each(num_directions: int) -> None:
    axes = torch.eye(16)[:num_directions]
    assert effective_rank(torch.cat((axes, -axes))) == pytest.approx(num_directions)
    assert effective_rank(with_singular_values([2.5] * num_directions, 40, 20)) == pytest.approx(num_directions)


def test_one_direction_has_rank_one() -> None:
    lengths = torch.linspace(-3, 8, 30)
    assert effective_rank(lengths[:, None] * torch.randn(12)) == pytest.approx(1, abs=1e-5)


def test_equal_rows_have_rank_one() -> None:
    assert effective_rank(torch.ones(20, 1) * torch.arange(5.0)) == 1
    assert effective_rank(torch.randn(1, 5)) == 1


@pytest.mark.parametrize("values", [[3.0, 1.0], [5.0, 2.0, 2.0, 0.1], [1.0, 1e-9]])
def test_equals_the_entropy_of_the_singular_values(values: list[float]) -> None:
    shares = [value / sum(values) for value in values]
    expected = math.exp(-sum(share * math.log(share) for share in shares))
    assert effective_rank(with_singular_values(values, 50, 9)) == pytest.approx(expected, rel=1e-6)


def test_equals_numpy_on_a_random_matrix() -> None:
    rows = np.random.default_rng(1).standard_normal((60, 20)).astype(np.float32) * np.linspace(0.1, 2, 20) + 4
    singular_values = np.linalg.svd(rows - rows.mean(0, keepdims=True), compute_uv=False)
    shares = singular_values / singular_values.sum()
    expected = float(np.exp(-(shares * np.log(shares)).sum()))
    assert effective_rank(torch.from_numpy(rows)) == pytest.approx(expected, rel=1e-5)
    assert effective_rank(torch.from_numpy(rows)) <= 20


def test_a_common_offset_and_scale_change_nothing() -> None:
    rows = torch.randn(30, 8, dtype=torch.float64)
    assert effective_rank(7 * rows + 100) == pytest.approx(effective_rank(rows), rel=1e-9)


def test_rows_bound_the_rank() -> None:
    assert 6 < effective_rank(torch.randn(8, 500)) <= 7


@pytest.mark.parametrize("shape", [(2, 3), (5, 4), (40, 16)])
def test_cosine_diversity_equals_a_double_loop(shape: tuple[int, int]) -> None:
    rows = np.random.default_rng(0).standard_normal(shape) + 0.5
    cosines = [
        float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        for i, a in enumerate(rows)
        for j, b in enumerate(rows)
        if i != j
    ]
    assert cosine_diversity(torch.from_numpy(rows)) == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-9)


def test_cosine_diversity_of_known_directions() -> None:
    line = torch.ones(6, 4) * torch.arange(1, 7)[:, None]
    assert cosine_diversity(line) == pytest.approx(0, abs=1e-12)
    assert cosine_diversity(torch.eye(5)) == pytest.approx(1)
    assert cosine_diversity(torch.tensor([[1.0, 2.0], [-2.0, -4.0]])) == pytest.approx(2)


def build(*, monitor_every: int, global_batch_size: int, max_rows: int = MONITOR_ROWS, dim: int = 4) -> CollapseMonitor:
    return CollapseMonitor(
        monitor_every=monitor_every,
        global_batch_size=global_batch_size,
        embed_dim=dim,
        device=torch.device("cpu"),
        max_rows=max_rows,
    )


@pytest.mark.parametrize("monitor_every", [1, 2, 3, 10])
@pytest.mark.parametrize("global_batch_size", [1, 3, 4, 8, 20])
@pytest.mark.parametrize("max_rows", [8, 9])
def test_measures_the_last_rows_of_the_stream_in_order(
    monitor_every: int, global_batch_size: int, max_rows: int
) -> None:
    """And collects no step of which nothing is left when it measures."""
    monitor = build(monitor_every=monitor_every, global_batch_size=global_batch_size, max_rows=max_rows)
    stream = torch.randn(0, 4)
    measured = [step for step in range(40) if (step + 1) % monitor_every == 0]
    for step in range(40):
        rows = torch.randn(global_batch_size, 4)
        stream = torch.cat((stream, rows))
        next_measure = min((m for m in measured if m >= step), default=None)
        if next_measure is not None:
            assert monitor.collects(step) == ((next_measure - step) * global_batch_size < max_rows)
        if monitor.collects(step):
            monitor.add(rows)
        assert monitor.measures(step) == (step in measured)
        if monitor.measures(step):
            expected = stream[-max_rows:]
            values, _ = monitor.measure()
            assert values["monitor_rows"] == len(expected)
            assert torch.equal(monitor.tensors()["buffer"][-len(expected) :], expected)
            assert values["effective_rank"] == pytest.approx(effective_rank(expected), rel=1e-9)
            if len(expected) > 1:
                assert values["cosine_diversity"] == pytest.approx(cosine_diversity(expected), rel=1e-9)


def test_256_rows_are_kept() -> None:
    monitor = build(monitor_every=50, global_batch_size=64)
    assert [step for step in range(50) if monitor.collects(step)] == [46, 47, 48, 49]
    assert monitor.tensors()["buffer"].shape == (256, 4)


def test_embeddings_are_copied_without_their_graph() -> None:
    monitor = build(monitor_every=1, global_batch_size=2)
    rows = torch.randn(2, 4, requires_grad=True)
    monitor.add(rows)
    assert not monitor.tensors()["buffer"].requires_grad


def test_one_row_has_no_diversity() -> None:
    monitor = build(monitor_every=1, global_batch_size=1)
    monitor.add(torch.randn(1, 4))
    assert monitor.measure()[0] == {"effective_rank": 1.0, "monitor_rows": 1}


def test_switched_off() -> None:
    monitor = build(monitor_every=0, global_batch_size=4)
    assert not any(monitor.measures(step) or monitor.collects(step) for step in range(20))
    # Switched on for a resumed run, it finds the buffer that it needs.
    on = build(monitor_every=2, global_batch_size=4)
    assert {name: t.shape for name, t in monitor.tensors().items()} == {n: t.shape for n, t in on.tensors().items()}


def test_warns_below_half_of_the_first_rank() -> None:
    """First 4 directions, then 3, 2.1, 1.9 and 4: a warning for 1.9 alone, and always against the first measurement."""
    monitor = build(monitor_every=1, global_batch_size=40, max_rows=40, dim=8)

    def measure(values: list[float]) -> str | None:
        monitor.add(with_singular_values(values, 40, 8).float())
        return monitor.measure()[1]

    two_and_a_bit, not_quite_two = [1.0, 1.0, 0.02], [1.0, 0.6]
    assert measure([1.0] * 4) is None
    assert measure([1.0] * 3) is None
    assert measure(two_and_a_bit) is None
    warning = measure(not_quite_two)
    assert warning is not None
    assert "effective rank 1.9 over 40 rows" in warning and "4.0 at the first measurement" in warning
    assert measure([1.0] * 4) is None
    assert measure([1.0] * 8) is None
    assert measure([1.0] * 3) is None
    assert measure([1.0]) is not None


def test_a_restored_monitor_goes_on_as_if_never_stopped() -> None:
    torch.manual_seed(0)
    first = build(monitor_every=2, global_batch_size=3, max_rows=8)
    for _ in range(3):
        first.add(torch.randn(3, 4))
    first.measure()
    state = json.loads(json.dumps(first.state_dict()))
    tensors = {name: tensor.clone() for name, tensor in first.tensors().items()}

    second = build(monitor_every=2, global_batch_size=3, max_rows=8)
    second.load_state_dict(state)
    for name, tensor in second.tensors().items():
        tensor.copy_(tensors[name])
    # The first rows after the restart push out the oldest alone; then all are alike, which is held against the rank
    # of before the restart.
    for _ in range(3):
        for monitor in (first, second):
            monitor.add(torch.ones(3, 4))
        assert torch.equal(first.tensors()["buffer"], second.tensors()["buffer"])
    found, warning = second.measure()
    assert (found, warning) == first.measure()
    assert warning is not None and "at the first measurement" in warning


def test_a_monitor_restored_before_its_first_rows_is_fresh() -> None:
    state = json.loads(json.dumps(build(monitor_every=2, global_batch_size=3).state_dict()))
    monitor = build(monitor_every=2, global_batch_size=3)
    monitor.load_state_dict(state)
    monitor.add(torch.randn(3, 4))
    assert monitor.measure()[0]["monitor_rows"] == 3
    assert monitor.measure()[1] is None


def test_the_first_rank_is_that_of_as_many_rows() -> None:
    """A rank over 4 rows, at most 3, must not hide a later fall from 20 to 5."""
    torch.manual_seed(0)
    monitor = build(monitor_every=1, global_batch_size=4, max_rows=40, dim=32)
    for _ in range(10):
        monitor.add(torch.randn(4, 32))
        assert monitor.measure()[1] is None
    monitor.add(torch.randn(40, 5) @ torch.randn(5, 32))
    assert "over 40 rows" in (monitor.measure()[1] or "")
