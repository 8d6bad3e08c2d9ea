"""Packed rows and the padded views into them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_jepa.packing import PackedSequences

any_lengths = st.lists(st.integers(1, 70), min_size=1, max_size=25)
deterministic = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@deterministic
@given(any_lengths)
def test_bounds(lengths: list[int]) -> None:
    packing = PackedSequences.from_lengths(lengths)
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.cu_seqlens.tolist() == [sum(lengths[:count]) for count in range(len(lengths) + 1)]
    assert packing.max_seqlen == max(lengths)
    moved = packing.to(torch.device("meta"))
    assert moved.cu_seqlens.device.type == "meta" and moved.max_seqlen == max(lengths)


@deterministic
@given(any_lengths)
def test_buckets_show_every_token_once_beside_its_own_sequence(lengths: list[int]) -> None:
    packing = PackedSequences.from_lengths(lengths)
    owner = [number for number, length in enumerate(lengths) for _ in range(length)]
    seen = []
    for bucket in packing.buckets:
        valid = torch.ones_like(bucket.index, dtype=torch.bool) if bucket.valid is None else bucket.valid
        assert bucket.valid is None or not bucket.valid.all()
        for row, real in zip(bucket.index.tolist(), valid.tolist(), strict=True):
            (number,) = {owner[position] for position in row}  # padding, too, stays in its sequence
            positions = [position for position, is_real in zip(row, real, strict=True) if is_real]
            start = sum(lengths[:number])
            assert positions == list(range(start, start + lengths[number]))
            assert real == sorted(real, reverse=True)
            # Never padded to twice its length.
            assert len(row) < 2 * lengths[number]
            seen += positions
    assert sorted(seen) == list(range(sum(lengths)))


@deterministic
@given(any_lengths)
def test_bucket_positions_undo_the_buckets(lengths: list[int]) -> None:
    packing = PackedSequences.from_lengths(lengths)
    row = torch.randperm(sum(lengths))
    spread = torch.cat([row[bucket.index].flatten() for bucket in packing.buckets])
    assert torch.equal(spread[packing.bucket_positions], row)
    real = torch.cat(
        [
            torch.ones(b.index.numel(), dtype=torch.bool) if b.valid is None else b.valid.flatten()
            for b in packing.buckets
        ]
    )
    assert real[packing.bucket_positions].all()


@pytest.mark.parametrize("lengths", [[4, 4, 4], [1], [1, 1], [5, 8, 6, 7, 8], [3, 300, 3]])
def test_few_attention_calls(lengths: list[int]) -> None:
    """One bucket for every power of two that occurs, and no mask where nothing is padded."""
    buckets = PackedSequences.from_lengths(lengths).buckets
    assert len(buckets) == len({(length - 1).bit_length() for length in lengths})
    for bucket in buckets:
        lengths_here = {lengths[0]} if len(set(lengths)) == 1 else None
        assert lengths_here is None or bucket.valid is None


@deterministic
@given(any_lengths | st.integers(1, 9).flatmap(lambda count: st.integers(1, 20).map(lambda length: [length] * count)))
def test_an_even_row_is_its_own_bucket(lengths: list[int]) -> None:
    packing = PackedSequences.from_lengths(lengths)
    assert packing.is_even == (len(set(lengths)) == 1)
    if packing.is_even:
        assert torch.equal(packing.buckets[0].index, torch.arange(sum(lengths)).view(len(lengths), -1))


@pytest.mark.parametrize("lengths", [[1], [5], [3, 1, 4, 2], [100, 28, 128, 1, 300, 7], [128, 256]])
def test_the_block_mask_shows_every_token_its_own_sequence(lengths: list[int]) -> None:
    mask = PackedSequences.from_lengths(lengths).block_mask
    owner = torch.tensor([number for number, length in enumerate(lengths) for _ in range(length)])
    every = torch.arange(len(owner))
    seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), every[:, None], every[None])
    assert torch.equal(seen, owner[:, None] == owner[None])
    pairs = {(q // 128, k // 128) for q, k in seen.nonzero().tolist()}
    assert set(map(tuple, mask.to_dense()[0, 0].nonzero().tolist())) == pairs
    assert mask.seq_lengths == (len(owner), len(owner))


@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 2], [-1]])
def test_a_sequence_without_tokens_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="packed sequences need at least one token each"):
        PackedSequences.from_lengths(lengths)
