"""Rows of prompt, canvas and padding, and the block of the canvas that is being filled.

Shape legend: N prompts, B rows, T tokens of a row, G tokens of a canvas, m scored tokens of a row.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Some rows of a batch.

    Args:
        tokens: int64 [B, T], every row its prompt, its canvas, and padding; written in place.
        lengths: int64 [B], tokens of the prompts.
        gen_length: tokens of a canvas, G.
        sizes: tokens of each row without padding, known to the host.
        prompts: for each row, which prompt it belongs to.
        index: the same on the device of the model, int64 [B].
        generators: for each row, its random numbers; empty when none are needed.
    """

    tokens: Tensor
    lengths: Tensor
    gen_length: int
    sizes: list[int]
    prompts: list[int]
    index: Tensor
    generators: list[torch.Generator]

    @cached_property
    def real(self) -> Tensor | None:
        """Bool [B, T], False at padding; None where there is none."""
        num_tokens = self.tokens.size(1)
        if min(self.sizes) == num_tokens:
            return None
        return torch.arange(num_tokens, device=self.tokens.device) < self.lengths[:, None] + self.gen_length

    def columns(self, start: int, stop: int) -> Tensor:
        """int64 [B, stop - start], where the columns [start, stop) of each canvas stand in its row."""
        return self.lengths[:, None] + torch.arange(start, stop, device=self.tokens.device)

    def canvas(self) -> Tensor:
        """int64 [B, G], a copy of what is on the canvases."""
        return self.tokens.gather(1, self.columns(0, self.gen_length))

    def take(self, rows: list[int]) -> "Rows":
        """Some of the rows."""
        return replace(
            self,
            tokens=self.tokens[rows],
            lengths=self.lengths[rows],
            sizes=[self.sizes[row] for row in rows],
            prompts=[self.prompts[row] for row in rows],
            index=self.index[rows],
            generators=[self.generators[row] for row in rows] if self.generators else [],
        )

    def join(self, others: Sequence["Rows"]) -> "Rows":
        """These rows and others of the same T."""
        every = [self, *others]
        return replace(
            self,
            tokens=torch.cat([rows.tokens for rows in every]),
            lengths=torch.cat([rows.lengths for rows in every]),
            sizes=[size for rows in every for size in rows.sizes],
            prompts=[prompt for rows in every for prompt in rows.prompts],
            index=torch.cat([rows.index for rows in every]),
            generators=[generator for rows in every for generator in rows.generators],
        )

    def trim(self) -> "Rows":
        """The same rows, padded no further than to the longest of them."""
        return replace(self, tokens=self.tokens[:, : max(self.sizes, default=0)])


def build_rows(
    prompts: Sequence[Sequence[int]],
    *,
    gen_length: int,
    mask_id: int,
    pad_id: int,
    seeds: Sequence[int],
    device: torch.device | str,
) -> Rows:
    """A row for every prompt, with nothing but masks on its canvas; `seeds` are one per prompt, or none at all."""
    sizes = [len(prompt) + gen_length for prompt in prompts]
    tokens = [
        [*prompt, *[mask_id] * gen_length, *[pad_id] * (max(sizes) - size)]
        for prompt, size in zip(prompts, sizes, strict=True)
    ]
    return Rows(
        tokens=torch.tensor(tokens, device=device),
        lengths=torch.tensor([len(prompt) for prompt in prompts], device=device),
        gen_length=gen_length,
        sizes=sizes,
        prompts=list(range(len(prompts))),
        index=torch.arange(len(prompts), device=device),
        generators=[torch.Generator(device).manual_seed(seed) for seed in seeds],
    )


class Canvases:
    """The canvases of a batch, one block of which is filled at a time.

    Attributes:
        rows: those with masks left in the block.
        block: columns of the canvas that are being filled, first and one behind the last.
        left: masked tokens of the block in each of `rows`.
    """

    def __init__(self, rows: Rows, *, stop_ids: Collection[int], pad_id: int) -> None:
        self.rows = rows
        self._full: list[Rows] = []  # rows that wait for the others to fill their block
        self._canvases = rows.canvas()  # [N, G], of rows that are not in `rows`
        self._pad_id = pad_id
        self._stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64, device=rows.tokens.device)
        self.open_block(0, rows.gen_length)

    def open_block(self, start: int, stop: int) -> None:
        """Turn to the columns [start, stop) of the canvas, all of them masked."""
        self.block = (start, stop)
        self.left = [stop - start] * len(self.rows.prompts)
        self._masked = torch.ones(len(self.left), stop - start, dtype=torch.bool, device=self.rows.tokens.device)

    def first_masked(self, num_columns: int) -> tuple[Tensor, Tensor]:
        """The first masked columns of the block in their rows, int64 [B, m], and whether they are masked, bool [B, m].

        Rows with fewer than `num_columns` masks are filled up with columns that have a token.
        """
        offsets = (~self._masked).long().argsort(dim=1, stable=True)[:, :num_columns]
        return self.rows.lengths[:, None] + self.block[0] + offsets, self._masked.gather(1, offsets)

    def commit(self, columns: Tensor, picked: Tensor, chosen: Tensor, left: list[int] | None) -> None:
        """Write tokens where masks were; rows without masks in the block then wait until it is closed.

        Args:
            columns: int64 [B, m], where they stand in their rows.
            picked: int64 [B, m], the tokens.
            chosen: bool [B, m], which of them are written; only masked ones.
            left: masked tokens of the block that are left in each row, if the host knows; else the device is asked.
        """
        tokens = self.rows.tokens
        tokens.scatter_(1, columns, torch.where(chosen, picked, tokens.gather(1, columns)))
        offsets = columns - self.rows.lengths[:, None] - self.block[0]
        self._masked.scatter_(1, offsets, self._masked.gather(1, offsets) & ~chosen)
        self.left = self._masked.sum(1).tolist() if left is None else left
        full = [row for row, num_left in enumerate(self.left) if not num_left]
        if full and len(full) < len(self.left):
            self._set_aside(full)

    def close_block(self) -> None:
        """Let the rows leave that have a stop id, with padding behind the first one; after the last block, all."""
        rows = self.rows.join(self._full) if self._full else self.rows
        self._full = []
        canvas = rows.canvas()
        is_stop = torch.isin(canvas, self._stop_ids)
        is_behind = is_stop.cumsum(1) > is_stop.long()
        self._canvases[rows.index] = canvas.masked_fill(is_behind, self._pad_id)
        if self.block[1] == rows.gen_length:
            rows = rows.take([])
        elif len(self._stop_ids):
            going_on = [row for row, has_ended in enumerate(is_stop.any(1).tolist()) if not has_ended]
            rows = rows if len(going_on) == len(rows.prompts) else rows.take(going_on).trim()
        self.rows = rows
        self.left = [0] * len(rows.prompts)

    def now(self) -> Tensor:
        """int64 [N, G], a copy of what is on the canvases."""
        canvases = self._canvases.clone()
        canvases[self.rows.index] = self.rows.canvas()
        return canvases

    def _set_aside(self, full: list[int]) -> None:
        rows = self.rows.take(full)
        self._full.append(rows)
        self._canvases[rows.index] = rows.canvas()
        others = [row for row, num_left in enumerate(self.left) if num_left]
        self.rows = self.rows.take(others)
        self.left = [self.left[row] for row in others]
        self._masked = self._masked[others]
