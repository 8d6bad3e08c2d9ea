"""Micro-batches, taken apart again: packed and padded rows hold the same sequences, views and losses-to-be."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from dllm_jepa.data import BatchPlan, MicroBatch, TrainingBatches
from dllm_jepa.data._collate import collate
from dllm_jepa.jepa import Views, fixed_ratio_views, uniform_ratio_views
from dllm_jepa.packing import PackedSequences

MASK_ID, PAD_ID = 90, 91
LENGTHS = [7, 2, 12, 3, 5, 9, 4, 4]
Drawn = list[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], Views]]

both_layouts = pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])


class Dataset:
    """Sequences of different lengths; the first third of each is prompt. int32, as the real ones."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.tokens = [generator.integers(0, 90, length).astype(np.int32) for length in LENGTHS]
        self.maskable = [np.arange(length) >= length // 3 for length in LENGTHS]
        self.lengths = np.array(LENGTHS)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        return self.tokens[index], self.maskable[index]


@pytest.fixture
def drawn() -> Drawn:
    dataset, sampler = Dataset(), uniform_ratio_views()
    clean = [tokens.astype(np.int64) for tokens in dataset.tokens]
    return [
        (tokens, maskable, sampler(tokens, maskable, mask_id=MASK_ID, seed=0, epoch=0, index=index))
        for index, (tokens, maskable) in enumerate(zip(clean, dataset.maskable, strict=True))
    ]


def sequences(batch: MicroBatch, values: Tensor) -> list[Tensor]:
    """The part of a [B, T] field that belongs to each sequence, by the bounds that the backbone sees."""
    if isinstance(batch.attention_mask, PackedSequences):
        assert values.shape[0] == 1
        bounds = batch.attention_mask.cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == values.shape[1]
        return [values[0, start:end] for start, end in zip(bounds, bounds[1:], strict=False)]
    assert batch.attention_mask.dtype == torch.bool
    return [row[real] for row, real in zip(values, batch.attention_mask, strict=True)]


@both_layouts
def test_the_sequences_can_be_read_back(drawn: Drawn, packed: bool) -> None:
    batch = collate(drawn, [4, 0, 9, 2, 1, 7, 6, 5], pad_id=PAD_ID, packed=packed)
    assert batch.context.shape == ((1, sum(LENGTHS)) if packed else (len(LENGTHS), max(LENGTHS)))
    assert batch.batch_positions.tolist() == [4, 0, 9, 2, 1, 7, 6, 5]
    assert batch.num_sequences == len(LENGTHS) and batch.num_tokens == sum(LENGTHS)
    for name in ("context", "target"):
        tokens, ids = sequences(batch, getattr(batch, name)), sequences(batch, getattr(batch, f"{name}_ids"))
        assert len(tokens) == len(drawn)
        for number, (_, _, views) in enumerate(drawn):
            view = getattr(views, name)
            assert tokens[number].tolist() == view.tokens.tolist()
            assert ids[number].tolist() == [-1 if masked else number for masked in view.masked]
    for number, positions in enumerate(sequences(batch, batch.input_pos)):
        assert positions.tolist() == list(range(LENGTHS[number]))


def test_padding_counts_for_nothing(drawn: Drawn) -> None:
    batch = collate(drawn, range(len(drawn)), pad_id=PAD_ID, packed=False)
    assert isinstance(batch.attention_mask, Tensor)
    assert batch.attention_mask.sum(1).tolist() == LENGTHS
    # On the right: real tokens first.
    assert torch.equal(batch.attention_mask, batch.attention_mask.sort(dim=1, descending=True).values)
    padding = ~batch.attention_mask
    for name, fill in {"context": PAD_ID, "target": PAD_ID, "context_ids": -1, "target_ids": -1}.items():
        assert (getattr(batch, name)[padding] == fill).all()
    assert not padding.flatten()[batch.masked_positions].any()
    assert not padding.flatten()[batch.target_visible].any()
    # A position that the rotary table has, whatever its length.
    assert (batch.input_pos < max(LENGTHS)).all() and (batch.input_pos >= 0).all()


@both_layouts
def test_the_masked_tokens_and_what_they_hide(drawn: Drawn, packed: bool) -> None:
    batch = collate(drawn, range(len(drawn)), pad_id=PAD_ID, packed=packed)
    contexts = [views.context for _, _, views in drawn]
    expected = [
        (number, int(position), int(tokens[position]))
        for number, (tokens, _, views) in enumerate(drawn)
        for position in np.flatnonzero(views.context.masked)
    ]
    flat = batch.masked_positions
    places = batch.sequence_of_masked, batch.input_pos.flatten()[flat], batch.labels
    assert list(zip(*(values.tolist() for values in places), strict=True)) == expected
    assert (batch.context.flatten()[flat] == MASK_ID).all() and (batch.context_ids.flatten()[flat] == -1).all()
    assert int((batch.context == MASK_ID).sum()) == len(flat)
    assert batch.target_visible.tolist() == (batch.target_ids.flatten() >= 0).nonzero().flatten().tolist()
    assert batch.num_masked.tolist() == [int(view.masked.sum()) for view in contexts]
    assert batch.num_maskable.tolist() == [length - length // 3 for length in LENGTHS]
    assert batch.mask_ratio.tolist() == torch.tensor([view.mask_ratio for view in contexts]).tolist()
    assert batch.loss_counts().keys() == {"sequence_of_masked", "mask_ratio", "num_masked", "num_maskable"}
    assert all(batch.loss_counts()[name] is getattr(batch, name) for name in batch.loss_counts())
    for name, value in vars(batch).items():
        if isinstance(value, Tensor) and name not in ("mask_ratio", "attention_mask"):
            assert value.dtype == torch.int64, name


@both_layouts
def test_an_idle_micro_batch_is_one_token_that_counts_for_nothing(packed: bool) -> None:
    batch = collate([], [], pad_id=PAD_ID, packed=packed)
    assert batch.num_sequences == batch.num_tokens == 0
    assert batch.context.tolist() == batch.target.tolist() == [[PAD_ID]]
    assert batch.context_ids.tolist() == batch.target_ids.tolist() == [[-1]]
    assert batch.input_pos.tolist() == [[0]]
    assert [len(part) for part in sequences(batch, batch.context)] == [1]
    for name in ("masked_positions", "labels", "target_visible", "batch_positions", *batch.loss_counts()):
        assert getattr(batch, name).shape == (0,)
        assert getattr(batch, name).dtype == (torch.float32 if name == "mask_ratio" else torch.int64)


@both_layouts
def test_moves_as_a_whole(drawn: Drawn, packed: bool) -> None:
    batch = collate(drawn, range(len(drawn)), pad_id=PAD_ID, packed=packed)
    moved = batch.to(torch.device("meta"))
    tensors = {name: value for name, value in vars(moved).items() if isinstance(value, Tensor)}
    assert len(tensors) == len([value for value in vars(batch).values() if isinstance(value, Tensor)])
    if isinstance(moved.attention_mask, PackedSequences):
        tensors["bounds"] = moved.attention_mask.cu_seqlens
    assert {value.device.type for value in tensors.values()} == {"meta"}
    assert (moved.num_sequences, moved.num_tokens) == (batch.num_sequences, batch.num_tokens)


def build(num_ranks: int, tokens_per_device: int, packed: bool, seed: int = 0) -> list[TrainingBatches]:
    """The batches of every rank, each with a plan of its own as in separate processes."""
    return [
        TrainingBatches(
            Dataset(),
            BatchPlan(
                np.array(LENGTHS),
                global_batch_size=4,
                tokens_per_device=tokens_per_device,
                num_ranks=num_ranks,
                seed=seed,
                packed=packed,
            ),
            fixed_ratio_views(),
            rank=rank,
            seed=seed,
            mask_id=MASK_ID,
            pad_id=PAD_ID,
            packed=packed,
        )
        for rank in range(num_ranks)
    ]


def views_in_batch_order(ranks: list[TrainingBatches], step: int) -> list[tuple[list[int], list[int]]]:
    """Context and target view of every sequence of the global batch."""

    def parts() -> Iterator[tuple[int, tuple[list[int], list[int]]]]:
        for rank in ranks:
            for batch in rank.step(step):
                if batch.num_sequences:
                    pairs = zip(sequences(batch, batch.context), sequences(batch, batch.target), strict=True)
                    for position, (context, target) in zip(batch.batch_positions.tolist(), pairs, strict=True):
                        yield position, (context.tolist(), target.tolist())

    found = dict(parts())
    assert sorted(found) == list(range(4))
    return [found[position] for position in range(4)]


@pytest.mark.parametrize("step", [0, 5])
def test_the_split_does_not_change_what_a_step_sees(step: int) -> None:
    reference = views_in_batch_order(build(1, 100, True), step)
    for split in ((1, 12, True), (2, 12, True), (4, 100, True), (1, 100, False), (3, 12, False)):
        assert views_in_batch_order(build(*split), step) == reference


@pytest.mark.parametrize(("step", "epoch", "seed"), [(1, 0, 0), (3, 1, 0), (3, 1, 5)])
def test_the_views_are_those_of_the_samples(step: int, epoch: int, seed: int) -> None:
    """Drawn for seed, epoch and dataset index, from the clean tokens of that row."""
    (batches,), dataset = build(1, 100, True, seed), Dataset()
    assert batches.epoch(step) == epoch
    for sample, (context, target) in zip(batches.samples(step), views_in_batch_order([batches], step), strict=True):
        tokens, maskable = dataset[sample]
        call = {"mask_id": MASK_ID, "seed": seed, "epoch": epoch, "index": sample}
        views = fixed_ratio_views()(tokens.astype(np.int64), maskable, **call)
        assert (context, target) == (views.context.tokens.tolist(), views.target.tokens.tolist())
