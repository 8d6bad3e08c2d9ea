"""Micro-batches: both views of some sequences, laid out in one packed row or in padded rows, ahead of the loop.

Shape legend: S sequences, B rows and T tokens of a row (packed: B = 1), n masked tokens of the context views.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dllm_jepa.data._batch_plan import BatchPlan
from dllm_jepa.packing import PackedSequences

STEPS_AHEAD = 2


class Sequences(Protocol):
    """A dataset of tokenized sequences."""

    def __len__(self) -> int: ...  # noqa: D105

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]: ...  # noqa: D105


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward needs.

    Args:
        context: int64 [B, T], context views.
        target: int64 [B, T], target views.
        attention_mask: bounds of the packed sequences, or bool [B, T], True at real tokens.
        input_pos: int64 [B, T], position of each token in its sequence.
        context_ids: int64 [B, T], sequence (from 0) that a visible token of the context view belongs to; -1 at masked
            tokens and padding.
        target_ids: int64 [B, T], the same for the target view.
        target_visible: int64 [m], flat positions of the visible tokens of the target view.
        masked_positions: int64 [n], flat positions of the masked tokens of the context views.
        labels: int64 [n], their clean tokens.
        sequence_of_masked: int64 [n], their sequences.
        mask_ratio: fp32 [S], mask ratio of the context views.
        num_masked: int64 [S], masked tokens of the context views.
        num_maskable: int64 [S], maskable tokens.
        batch_positions: int64 [S], positions of the sequences in the global batch.
        num_sequences: S; 0 for a rank that has nothing to do in this round and only keeps step with the others.
        num_tokens: tokens without padding.
        squared_lengths: sum over the sequences of their squared lengths in tokens, which attention grows with.
    """

    context: Tensor
    target: Tensor
    attention_mask: PackedSequences | Tensor
    input_pos: Tensor
    context_ids: Tensor
    target_ids: Tensor
    target_visible: Tensor
    masked_positions: Tensor
    labels: Tensor
    sequence_of_masked: Tensor
    mask_ratio: Tensor
    num_masked: Tensor
    num_maskable: Tensor
    batch_positions: Tensor
    num_sequences: int
    num_tokens: int
    squared_lengths: int

    def counts(self) -> tuple[int, int, int, int, int]:
        """Sequences, masked tokens, tokens without padding, tokens with padding, and squared lengths."""
        return self.num_sequences, len(self.labels), self.num_tokens, self.context.numel(), self.squared_lengths

    def loss_counts(self) -> dict[str, Tensor]:
        """The fields that weigh the loss of a masked token, by name."""
        return {
            "sequence_of_masked": self.sequence_of_masked,
            "mask_ratio": self.mask_ratio,
            "num_masked": self.num_masked,
            "num_maskable": self.num_maskable,
        }

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on another device; from page-locked memory it is copied while the device works."""
        return self._map(lambda v: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v.to(device))

    def pin_memory(self) -> "MicroBatch":
        """The same micro-batch in page-locked memory."""
        return self._map(lambda value: value.pin_memory())

    def _map(self, move: Callable[[Any], Any]) -> "MicroBatch":
        held = {name: value for name, value in vars(self).items() if isinstance(value, Tensor | PackedSequences)}
        return replace(self, **{name: move(value) for name, value in held.items()})


def total_counts(micro_batches: Sequence[MicroBatch]) -> list[int]:
    """The sums of their `MicroBatch.counts`."""
    return [sum(counts) for counts in zip(*(batch.counts() for batch in micro_batches), strict=True)]


class TrainingBatches:
    """The micro-batches of one rank, step by step.

    Args:
        draw_views: draws the two views of a sequence, as `jepa.ViewSampler` does.
        packed: one packed row a micro-batch, instead of padded rows.
    """

    def __init__(
        self,
        dataset: Sequences,
        plan: BatchPlan,
        draw_views: Callable[..., Any],
        *,
        rank: int,
        seed: int,
        mask_id: int,
        pad_id: int,
        packed: bool = True,
    ) -> None:
        self._dataset = dataset
        self._plan = plan
        self._draw_views = draw_views
        self._rank = rank
        self._seed = seed
        self._mask_id = mask_id
        self._pad_id = pad_id
        self._packed = packed

    def step(self, step: int) -> Iterator[MicroBatch]:
        """The micro-batches of a step (from 0), on CPU."""
        plan = self._plan.step(step)
        for positions in plan.micro_batches[self._rank]:
            drawn = [self._draw(int(plan.samples[position]), plan.epoch) for position in positions]
            yield collate(drawn, positions, pad_id=self._pad_id, packed=self._packed)

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that a step belongs to."""
        return self._plan.epoch(step)

    def samples(self, step: int) -> list[int]:
        """Dataset indices of the global batch of a step, for error messages."""
        return [int(sample) for sample in self._plan.samples(step)]

    def _draw(self, index: int, epoch: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], Any]:
        tokens, maskable = self._dataset[index]
        clean = tokens.astype(np.int64)
        views = self._draw_views(clean, maskable, mask_id=self._mask_id, seed=self._seed, epoch=epoch, index=index)
        return clean, maskable, views


class PrefetchedBatches:
    """Reads ahead of the training loop. A thread does: drawing the views of a step takes milliseconds, not cores.

    What a step gets does not depend on it, since views are a pure function of seed, epoch and sequence.

    Args:
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


def collate(
    drawn: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], Any]],
    batch_positions: Sequence[int],
    *,
    pad_id: int,
    packed: bool,
) -> MicroBatch:
    """Lay out some sequences and note every position that the step will need.

    Without sequences the micro-batch is a single padding token that counts for nothing.

    Args:
        drawn: (clean tokens [T], maskable [T], views) of each sequence.
        batch_positions: their positions in the global batch.
        pad_id: id of the padding token.
        packed: one packed row instead of padded rows.
    """
    lengths = [len(tokens) for tokens, _, _ in drawn] or [1]
    shape = (1, sum(lengths)) if packed else (len(lengths), max(lengths))
    starts = np.cumsum([0, *lengths[:-1]]) if packed else np.arange(len(lengths)) * shape[1]
    # Flat position, in the layout, of every token of every sequence in turn.
    slots = np.concatenate([start + np.arange(length) for start, length in zip(starts, lengths, strict=True)])
    sequence_of = np.repeat(np.arange(len(drawn)), lengths[: len(drawn)])

    def lay_out(values: list[npt.NDArray[Any]], fill: int) -> Tensor:
        flat = np.full(shape[0] * shape[1], fill, dtype=np.int64)
        if values:
            flat[slots] = np.concatenate(values)
        return torch.from_numpy(flat.reshape(shape))

    def joined(values: list[Any], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        return np.concatenate([np.zeros(0, dtype=dtype), *values])

    context = [views.context for _, _, views in drawn]
    target = [views.target for _, _, views in drawn]
    sequences = np.split(sequence_of, np.cumsum(lengths)[:-1]) if drawn else []
    masked, hidden = (joined([view.masked for view in views], np.bool_) for views in (context, target))
    return MicroBatch(
        context=lay_out([view.tokens for view in context], pad_id),
        target=lay_out([view.tokens for view in target], pad_id),
        attention_mask=PackedSequences.from_lengths(lengths)
        if packed
        else torch.arange(shape[1]) < torch.tensor(lengths)[:, None],
        input_pos=lay_out([np.arange(length) for length in lengths], 0),
        context_ids=lay_out([np.where(v.masked, -1, s) for v, s in zip(context, sequences, strict=True)], -1),
        target_ids=lay_out([np.where(v.masked, -1, s) for v, s in zip(target, sequences, strict=True)], -1),
        target_visible=torch.from_numpy(slots[: len(hidden)][~hidden]),
        masked_positions=torch.from_numpy(slots[: len(masked)][masked]),
        labels=torch.from_numpy(joined([tokens for tokens, _, _ in drawn], np.int64)[masked]),
        sequence_of_masked=torch.from_numpy(sequence_of[masked]),
        mask_ratio=torch.tensor([view.mask_ratio for view in context], dtype=torch.float32),
        num_masked=torch.tensor([int(view.masked.sum()) for view in context], dtype=torch.int64),
        num_maskable=torch.tensor([int(maskable.sum()) for _, maskable, _ in drawn], dtype=torch.int64),
        batch_positions=torch.tensor(batch_positions, dtype=torch.int64),
        num_sequences=len(drawn),
        num_tokens=sum(lengths) if drawn else 0,
        squared_lengths=sum(length**2 for length in lengths) if drawn else 0,
    )
