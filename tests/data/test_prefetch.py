"""Reading ahead: the same micro-batches, sooner."""

import threading
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from dllm_jepa.data import BatchPlan, MicroBatch, PrefetchedBatches, TrainingBatches, total_counts
from dllm_jepa.jepa import fixed_ratio_views
from dllm_jepa.packing import PackedSequences

CPU = torch.device("cpu")
NUM_STEPS = 7


def training_batches() -> TrainingBatches:
    generator = np.random.default_rng(0)
    lengths = generator.integers(3, 20, 24)
    dataset = [(generator.integers(50, size=n, dtype=np.int32), np.ones(n, dtype=np.bool_)) for n in lengths]
    plan = BatchPlan(lengths, global_batch_size=8, tokens_per_device=60, num_ranks=1, seed=0)
    return TrainingBatches(dataset, plan, fixed_ratio_views(), rank=0, seed=0, mask_id=50, pad_id=51)


def plain(batch: MicroBatch) -> list[Any]:
    values = [getattr(batch, field.name) for field in fields(batch)]
    bounds = [value.cu_seqlens if isinstance(value, PackedSequences) else value for value in values]
    return [value.tolist() if isinstance(value, torch.Tensor) else value for value in bounds]


def test_a_step_gets_what_it_would_have_got_at_once() -> None:
    batches = training_batches()
    prefetched = PrefetchedBatches(batches, num_steps=NUM_STEPS, device=CPU)
    # From the middle of an epoch over its end, and back to a step again, as a resumed run in one process would.
    for step in (*range(1, NUM_STEPS), 3):
        assert [plain(batch) for batch in prefetched.step(step)] == [plain(batch) for batch in batches.step(step)]
    prefetched.close()


class Recorded:
    """Batches that note which steps were asked for, and on which thread."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.asked: list[int] = []
        self.threads: set[str] = set()
        self.reached = threading.Condition()
        self._fails_at = fails_at

    def step(self, step: int) -> Iterator[MicroBatch]:
        with self.reached:
            self.asked.append(step)
            self.threads.add(threading.current_thread().name)
            self.reached.notify_all()
        if step == self._fails_at:
            raise ValueError(f"step {step}")
        return iter(())

    def wait_for(self, steps: list[int]) -> None:
        with self.reached:
            assert self.reached.wait_for(lambda: self.asked == steps, timeout=60), self.asked


def prefetch(batches: Any) -> PrefetchedBatches:
    return PrefetchedBatches(batches, num_steps=NUM_STEPS, device=CPU)


def test_two_steps_are_read_ahead_by_another_thread_and_none_past_the_end() -> None:
    batches = Recorded()
    prefetched = prefetch(batches)
    assert batches.asked == []
    prefetched.step(3)
    batches.wait_for([3, 4, 5])
    prefetched.step(4)
    batches.wait_for([3, 4, 5, 6])
    prefetched.step(5)
    prefetched.step(6)
    prefetched.close()
    assert batches.asked == [3, 4, 5, 6]
    assert batches.threads == {"batches_0"}


def test_an_error_comes_to_its_step_and_the_thread_ends() -> None:
    prefetched = prefetch(Recorded(fails_at=2))
    prefetched.step(0)
    prefetched.step(1)
    with pytest.raises(ValueError, match="step 2"):
        prefetched.step(2)
    assert any(thread.name == "batches_0" for thread in threading.enumerate())
    prefetched.close()
    assert not any(thread.name == "batches_0" for thread in threading.enumerate())


def test_counts_of_a_step() -> None:
    micro_batches = list(training_batches().step(0))
    assert len(micro_batches) > 1
    lengths = [int(n) for batch in micro_batches for n in batch.attention_mask.cu_seqlens.diff()]  # type: ignore[union-attr]
    masked = sum(len(batch.labels) for batch in micro_batches)
    assert total_counts(micro_batches) == [8, masked, sum(lengths), sum(lengths), sum(n**2 for n in lengths)]


@pytest.mark.gpu
def test_copies_to_a_gpu_start_from_page_locked_memory_and_arrive_whole() -> None:
    device = torch.device("cuda")
    batches = training_batches()
    prefetched = PrefetchedBatches(batches, num_steps=1, device=device)
    for batch, expected in zip(prefetched.step(0), batches.step(0), strict=True):
        assert batch.context.is_pinned() and batch.attention_mask.cu_seqlens.is_pinned()  # type: ignore[union-attr]
        assert plain(batch.to(device)) == plain(expected)
    prefetched.close()
