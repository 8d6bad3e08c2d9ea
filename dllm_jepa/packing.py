"""Sequences laid end to end in one row, without padding.

Shape legend: S sequences, N tokens of the row (all sequences together), L longest sequence of a bucket.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length, as a padded view into the packed row.

    Args:
        index: int64 [S, L], position in the row of every token; padding repeats the first token of its sequence.
        valid: bool [S, L], False at padding; None when there is none.
    """

    index: Tensor
    valid: Tensor | None


class PackedSequences:
    """Where the sequences of a packed row begin and end; it travels through a backbone as its attention mask.

    Not a dataclass: FSDP rebuilds those at every unit that they pass, and what is cached here would be lost.

    Args:
        cu_seqlens: int32 [S + 1], cumulative lengths in tokens: sequence s is row[cu_seqlens[s]:cu_seqlens[s + 1]].
        max_seqlen: length in tokens of the longest sequence.
        num_tokens: N, known here so that nobody has to ask the device.
    """

    def __init__(self, cu_seqlens: Tensor, max_seqlen: int, num_tokens: int) -> None:
        """Take the bounds as they are; `from_lengths` makes them."""
        self.cu_seqlens = cu_seqlens
        self.max_seqlen = max_seqlen
        self.num_tokens = num_tokens

    @classmethod
    def from_lengths(cls, lengths: list[int]) -> "PackedSequences":
        """Build from the lengths of the sequences, in tokens and in row order.

        Raises:
            ValueError: if there is no sequence, or one without a token.
        """
        if not lengths or min(lengths) < 1:
            raise ValueError(f"packed sequences need at least one token each, got lengths {lengths}")
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        cu_seqlens[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        return cls(cu_seqlens, max(lengths), sum(lengths))

    def to(self, device: torch.device) -> "PackedSequences":
        """The same packing with `cu_seqlens` on `device`."""
        return PackedSequences(self.cu_seqlens.to(device, non_blocking=True), self.max_seqlen, self.num_tokens)

    def pin_memory(self) -> "PackedSequences":
        """The same packing with `cu_seqlens` in page-locked memory."""
        return PackedSequences(self.cu_seqlens.pin_memory(), self.max_seqlen, self.num_tokens)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Padded views, one for each power of two that some length rounds up to.

        So one padded attention call serves many sequences and never pads a sequence to more than twice its length.
        Computed once per packing and shared by all layers; reads `cu_seqlens` on the host.
        """
        bounds = self.cu_seqlens.tolist()
        by_size: dict[int, list[int]] = {}
        for sequence, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            by_size.setdefault((end - start - 1).bit_length(), []).append(sequence)
        starts, lengths = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff().long()
        buckets = []
        for members in by_size.values():
            member_ids = torch.tensor(members, device=starts.device)
            offsets = torch.arange(max(bounds[m + 1] - bounds[m] for m in members), device=starts.device)  # [L]
            valid = offsets < lengths[member_ids, None]  # [S, L]
            is_full = all(bounds[m + 1] - bounds[m] == len(offsets) for m in members)
            buckets.append(Bucket(starts[member_ids, None] + offsets * valid, None if is_full else valid))
        return tuple(buckets)

    @cached_property
    def is_even(self) -> bool:
        """Whether all sequences are equally long, so that the one bucket is the row itself, in order."""
        return len(self.buckets) == 1 and self.buckets[0].valid is None

    @cached_property
    def bucket_positions(self) -> Tensor:
        """int64 [N], where each token of the row stands in the flattened, concatenated buckets."""
        positions = torch.empty(int(self.cu_seqlens[-1]), dtype=torch.int64, device=self.cu_seqlens.device)
        offset = 0
        for bucket in self.buckets:
            slots = torch.arange(offset, offset + bucket.index.numel(), device=positions.device).view_as(bucket.index)
            real = slice(None) if bucket.valid is None else bucket.valid
            positions[bucket.index[real]] = slots[real]
            offset += bucket.index.numel()
        return positions

    @cached_property
    def block_mask(self) -> BlockMask:
        """For `flex_attention`: every token sees its own sequence. Computed once per packing, as the buckets are."""
        # int64 [N], sequence of every token
        owner = torch.repeat_interleave(self.cu_seqlens.diff(), output_size=self.num_tokens)

        def in_one_sequence(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return owner[query] == owner[key]

        return create_block_mask(in_one_sequence, None, None, len(owner), len(owner), owner.device)
