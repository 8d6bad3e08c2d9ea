"""Steps with a target branch, and the permutation of the control run."""

import math

import numpy as np
import pytest
import torch

from dllm_jepa.jepa import is_jepa_step, shuffled_partners


def test_every_step_is_the_default() -> None:
    assert all(is_jepa_step(step) for step in range(10))


@pytest.mark.parametrize("jepa_every", [1, 2, 3, 7])
def test_every_nth_step(jepa_every: int) -> None:
    steps = [step for step in range(50) if is_jepa_step(step, jepa_every=jepa_every)]
    assert steps == list(range(jepa_every - 1, 50, jepa_every))


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.25, 0.1, 0.75, 1 / 3, 0.9, 0.01, 0.6180339887])
def test_a_fraction_of_the_steps_spread_evenly(ratio: float) -> None:
    chosen = np.array([is_jepa_step(step, jepa_ratio=ratio) for step in range(400)])
    totals = np.concatenate(([0], chosen.cumsum()))
    assert [int(total) for total in totals] == [math.floor(num_steps * ratio) for num_steps in range(401)]
    for width in (1, 3, 10, 57):
        counts = totals[width:] - totals[:-width]
        assert np.abs(counts - width * ratio).max() < 1 + 1e-9


def test_the_ratio_overrides_the_interval() -> None:
    assert all(is_jepa_step(step, jepa_every=5, jepa_ratio=1.0) for step in range(10))


@pytest.mark.parametrize("num_sequences", [2, 3, 4, 5, 8, 31, 64, 256])
def test_partners_are_a_permutation_without_a_fixed_point(num_sequences: int) -> None:
    everyone = torch.arange(num_sequences)
    for seed in range(3):
        for step in range(40):
            partners = shuffled_partners(num_sequences, seed=seed, step=step)
            assert partners.dtype == torch.int64
            assert torch.equal(partners.sort().values, everyone)
            assert not (partners == everyone).any()


def test_partners_depend_on_seed_and_step_alone() -> None:
    names = [(seed, step) for seed in range(4) for step in range(10)]
    first = {name: shuffled_partners(32, seed=name[0], step=name[1]).tolist() for name in names}
    assert len({tuple(partners) for partners in first.values()}) == len(names)
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.rand(2), np.random.random(2)
    torch.manual_seed(3)
    np.random.seed(3)
    for seed, step in reversed(names):
        assert shuffled_partners(32, seed=seed, step=step).tolist() == first[seed, step]
    assert torch.equal(before[0], torch.rand(2)) and np.array_equal(before[1], np.random.random(2))


def test_every_other_sequence_is_an_equally_likely_partner() -> None:
    steps, num_sequences = 2000, 5
    counts = np.zeros((num_sequences, num_sequences))
    for step in range(steps):
        counts[np.arange(num_sequences), shuffled_partners(num_sequences, seed=0, step=step).numpy()] += 1
    off_diagonal = counts[~np.eye(num_sequences, dtype=bool)] / steps
    assert np.abs(off_diagonal - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / steps)


@pytest.mark.parametrize("num_sequences", [0, 1])
def test_a_sequence_alone_has_no_partner(num_sequences: int) -> None:
    with pytest.raises(ValueError, match=f"at least 2 sequences in the global batch, got {num_sequences}"):
        shuffled_partners(num_sequences, seed=0, step=0)
