"""Which sequences a step consumes, and how they are packed into micro-batches and dealt to the ranks.

The science knob (`global_batch_size`) and the memory knob (`tokens_per_device`) are separate: step s takes positions
s * G ... s * G + G - 1 of the epoch's order, a pure function of (seed, epoch), whatever the number of ranks. The data
position of a resumed run is its step number.

Shape legend: G sequences of the global batch, R ranks.
"""

import heapq
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from dllm_jepa.errors import ConfigError

IntArray = npt.NDArray[np.int64]

# Difference of micro-batches, as a part of the fullest, that is let be. Behind longest first a larger one means that
# the fullest has fewer than 1 / EVEN_ENOUGH sequences, which bounds the search for an exchange.
EVEN_ENOUGH = 0.001


@dataclass(frozen=True)
class StepPlan:
    """The sequences of one step.

    Args:
        epoch: epoch number from 0.
        samples: int64 [G], dataset indices in batch order.
        micro_batches: for each rank a list of micro-batches, each a list of positions in `samples`. All ranks have
            equally many; a micro-batch is empty only when there are fewer sequences than micro-batches.
    """

    epoch: int
    samples: IntArray
    micro_batches: list[list[list[int]]]


class BatchPlan:
    """Deals the sequences of a dataset to steps, ranks and micro-batches.

    The sequences that do not fill the last step of an epoch are left out of it; the next epoch has another order.

    Args:
        lengths: int64 [number of sequences], lengths in tokens.
        global_batch_size: G, sequences of a step over all ranks.
        tokens_per_device: largest micro-batch in tokens; padding counts when `packed` is false.
        num_ranks: R.
        packed: sequences lie end to end; otherwise every row is padded to the longest of its micro-batch.
        unsplit_for: what needs the sequences of a rank in one micro-batch, for the message that refuses more; None
            lets a step take several.

    Raises:
        ConfigError: the dataset is smaller than a step, a step than the number of ranks, a micro-batch than the
            longest sequence, or, where a step must not be split, than what a rank may get of it.
    """

    def __init__(
        self,
        lengths: IntArray,
        *,
        global_batch_size: int,
        tokens_per_device: int,
        num_ranks: int,
        seed: int,
        packed: bool = True,
        unsplit_for: str | None = None,
    ) -> None:
        if global_batch_size < num_ranks:
            raise ConfigError(
                f"global_batch_size={global_batch_size} is below the number of ranks ({num_ranks}): every rank needs a "
                "sequence; raise it or launch fewer processes"
            )
        if len(lengths) < global_batch_size:
            raise ConfigError(
                f"global_batch_size={global_batch_size} is above the {len(lengths)} sequences of the dataset: lower it"
            )
        if (longest := int(lengths.max())) > tokens_per_device:
            raise ConfigError(
                f"tokens_per_device={tokens_per_device} is below the longest sequence ({longest} tokens, sequence "
                f"{int(lengths.argmax())}): raise it to at least {longest} or lower max_seq_len"
            )
        most = largest_share(np.sort(lengths)[-global_batch_size:], num_ranks, packed=packed)
        if unsplit_for is not None and most > tokens_per_device:
            raise ConfigError(
                f"tokens_per_device={tokens_per_device} may split a step into several micro-batches a rank, as the "
                f"longest sequences make up to {most} tokens for one, and {unsplit_for} needs them in one: raise it to "
                f"{most}, lower global_batch_size, or do without {unsplit_for}"
            )
        self._lengths = lengths
        self._global_batch_size = global_batch_size
        self._tokens_per_device = tokens_per_device
        self._num_ranks = num_ranks
        self._seed = seed
        self._packed = packed
        self.steps_per_epoch = len(lengths) // global_batch_size
        self.num_left_out = len(lengths) % global_batch_size
        # Two epochs, so that reading ahead across their border does not shuffle twice.
        self._order = lru_cache(maxsize=2)(self._shuffle)

    def step(self, step: int) -> StepPlan:
        """The plan of a step, counted from 0 over all epochs."""
        samples = self.samples(step)
        split = split_packed if self._packed else split_padded
        bins = split(self._lengths[samples], self._tokens_per_device, self._num_ranks)
        return StepPlan(self.epoch(step), samples, deal(bins, self._num_ranks))

    def __str__(self) -> str:
        """Text for the user."""
        return f"{self.steps_per_epoch:,} steps an epoch, which leave out {self.num_left_out:,} sequences"

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that a step belongs to."""
        return step // self.steps_per_epoch

    def samples(self, step: int) -> IntArray:
        """int64 [G], the dataset indices of a step, in batch order."""
        start = step % self.steps_per_epoch * self._global_batch_size
        return self._order(self.epoch(step))[start : start + self._global_batch_size]

    def _shuffle(self, epoch: int) -> IntArray:
        generator = np.random.Generator(np.random.Philox(key=[self._seed, 1], counter=[0, 0, 0, epoch]))
        return generator.permutation(len(self._lengths))


def largest_share(lengths: IntArray, num_ranks: int, *, packed: bool) -> int:
    """Most tokens that a rank can get of a step, in one micro-batch; `lengths` are the longest that a step can have."""
    longest = int(lengths.max())
    if not packed:
        return longest * -(-len(lengths) // num_ranks)
    # Longest first: a sequence goes where there is less than an even share of the others.
    return -(-(int(lengths.sum()) + (num_ranks - 1) * longest) // num_ranks)


def split_packed(lengths: IntArray, capacity: int, num_ranks: int) -> list[list[int]]:
    """Split sequences into as few rounds of micro-batches as hold them, with nearly equal numbers of tokens.

    Longest sequence first, always into the emptiest micro-batch, then exchanges; one more round for all ranks while a
    micro-batch overflows.

    Args:
        lengths: int64 [G], in tokens, none above `capacity`.
        capacity: largest micro-batch in tokens, padding included.
        num_ranks: R.

    Returns:
        A multiple of R micro-batches, the fullest first, each a list of positions in `lengths`.
    """
    order = np.argsort(-lengths, kind="stable").tolist()
    sizes = lengths.tolist()
    num_rounds = -(-int(lengths.sum()) // (capacity * num_ranks))
    while True:
        loads = [(0, number) for number in range(num_rounds * num_ranks)]
        bins: list[list[int]] = [[] for _ in loads]
        for position in order:
            load, number = loads[0]
            heapq.heapreplace(loads, (load + sizes[position], number))
            bins[number].append(position)
        tokens = even_out(bins, lengths)
        if tokens.max() <= capacity:
            return [sorted(bins[number]) for number in np.argsort(-tokens, kind="stable")]
        num_rounds += 1


def even_out(bins: list[list[int]], lengths: IntArray) -> IntArray:
    """Exchange sequences between the fullest and the emptiest micro-batch as long as that brings them closer.

    Longest first leaves them apart by about the shortest sequence: 1 or 2 % of a micro-batch of 8 to 16 sequences. The
    micro-batches, lists of positions in `lengths`, are changed in place; returns their tokens, int64.
    """
    tokens = np.array([lengths[members].sum() for members in bins])
    while True:
        fullest, emptiest = int(tokens.argmax()), int(tokens.argmin())
        gap = tokens[fullest] - tokens[emptiest]
        if gap <= EVEN_ENOUGH * tokens[fullest]:
            return tokens
        # Row: the sequence that leaves the fullest. Column: the one that comes for it, the last stands for none.
        moved = lengths[bins[fullest]][:, None] - np.append(lengths[bins[emptiest]], 0)
        leaves, comes = divmod(int(np.abs(2 * moved - gap).argmin()), moved.shape[1])
        # Every exchange lowers the sum of squares of `tokens`, so that this ends.
        if not 0 < moved[leaves, comes] < gap:
            return tokens
        tokens[[fullest, emptiest]] += np.array([-1, 1]) * moved[leaves, comes]
        bins[emptiest].append(bins[fullest].pop(leaves))
        if comes < moved.shape[1] - 1:
            bins[fullest].append(bins[emptiest].pop(comes))


def split_padded(lengths: IntArray, capacity: int, num_ranks: int) -> list[list[int]]:
    """Split sequences into micro-batches of similar lengths, each padded to its longest; see `split_packed`."""
    sizes = lengths.tolist()
    bins: list[list[int]] = []
    for position in np.argsort(-lengths, kind="stable").tolist():
        # Sequences arrive longest first, so the first of a micro-batch is its width.
        if not bins or sizes[bins[-1][0]] * (len(bins[-1]) + 1) > capacity:
            bins.append([])
        bins[-1].append(position)

    def padded_tokens(members: list[int]) -> int:
        return sizes[members[0]] * len(members) if members else 0

    while len(bins) % num_ranks:
        bins.sort(key=padded_tokens, reverse=True)
        widest = next((number for number, members in enumerate(bins) if len(members) > 1), None)
        if widest is None:
            bins.append([])
        else:
            members = bins.pop(widest)
            bins += [members[: len(members) // 2], members[len(members) // 2 :]]
    return sorted(bins, key=padded_tokens, reverse=True)


def deal(bins: list[list[int]], num_ranks: int) -> list[list[list[int]]]:
    """Deal micro-batches, the largest first, to ranks, so that those that run side by side have nearly the same work.

    Every other round is dealt backwards, which evens out the totals.
    """
    rounds = [bins[start : start + num_ranks] for start in range(0, len(bins), num_ranks)]
    rounds = [members[::-1] if number % 2 else members for number, members in enumerate(rounds)]
    return [[members[rank] for members in rounds] for rank in range(num_ranks)]
