"""Random numbers of a batch, from one generator per row: a row's do not depend on the rows beside it.

Shape legend: B rows, m scored tokens of a row, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowNoise:
    """The random numbers of one step.

    Args:
        generators: one per row, on the device of the model.
        counts: tokens of each row that are to get random numbers, the first ones; rows with 0 draw nothing.
        num_columns: scored tokens of a row, m.
    """

    generators: Sequence[torch.Generator]
    counts: Sequence[int]
    num_columns: int

    def uniform(self) -> Tensor:
        """float64 [B, m], uniform in [0, 1); 0 behind the first `counts` of a row."""
        device = self.generators[0].device
        drawn = torch.zeros(len(self.counts), self.num_columns, dtype=torch.float64, device=device)
        for row, count, generator in zip(drawn, self.counts, self.generators, strict=True):
            row[:count] = torch.rand(count, dtype=torch.float64, generator=generator, device=device)
        return drawn

    def part(self, rows: slice, columns: slice) -> "RowNoise":
        """The random numbers of some rows and columns; the parts of a row are to draw theirs from left to right."""
        width = columns.stop - columns.start
        counts = [min(max(count - columns.start, 0), width) for count in self.counts[rows]]
        return RowNoise(self.generators[rows], counts, width)

    def gumbel_rows(self, vocab_size: int) -> Iterator[Tensor]:
        """Gumbel noise float64 [count, V] for every row in turn, so that never more than one row's is in memory."""
        for count, generator in zip(self.counts, self.generators, strict=True):
            shape = (count, vocab_size)
            yield gumbel(torch.rand(shape, dtype=torch.float64, generator=generator, device=generator.device))


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel noise from uniform numbers in float64, in their place.

    In fp32 the tail of the noise would be cut, which lowers the diversity (Zheng et al. 2024, arXiv 2409.02908).
    """
    return uniform.log_().neg_().log_().neg_()
