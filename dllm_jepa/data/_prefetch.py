"""The micro-batches of the next steps, put together by a thread while the present step runs."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from dllm_jepa.data._collate import MicroBatch, TrainingBatches

STEPS_AHEAD = 2


class PrefetchedBatches:
    """Reads ahead of the training loop. A thread does: drawing the views of a step takes milliseconds, not cores.

    What a step gets does not depend on it, since views are a pure function of seed, epoch and sequence.

    Args:
        batches: the micro-batches of this rank.
        num_steps: steps of the whole run.
        device: where they will go. For a GPU they are put into page-locked memory, from which it copies while it works.
    """

    def __init__(self, batches: TrainingBatches, *, num_steps: int, device: torch.device) -> None:
        self._batches = batches
        self._num_steps = num_steps
        self._pins = device.type == "cuda"
        # A new thread would lock pages by way of GPU 0, whatever GPU this rank has.
        on_start = (torch.cuda.set_device, (torch.cuda.current_device(),)) if self._pins else (None, ())
        self._worker = ThreadPoolExecutor(1, "batches", *on_start)
        self._pending: dict[int, Future[list[MicroBatch]]] = {}

    def step(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step (from 0), on CPU; those of the next steps are begun."""
        for number in range(step, min(step + 1 + STEPS_AHEAD, self._num_steps)):
            if number not in self._pending:
                self._pending[number] = self._worker.submit(self._prepare, number)
        return self._pending.pop(step).result()

    def close(self) -> None:
        """End the thread; what it has not begun is dropped."""
        self._worker.shutdown(cancel_futures=True)

    def _prepare(self, step: int) -> list[MicroBatch]:
        micro_batches = self._batches.step(step)
        return [batch.pin_memory() if self._pins else batch for batch in micro_batches]
