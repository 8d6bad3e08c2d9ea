"""Rows of prompt, canvas and padding, and the block of the canvas that is being filled.

Shape legend: B rows, T tokens of a row, G tokens of a canvas, m scored tokens of a row.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor


class CanvasRows:
    """The rows that are still being filled, and the canvases of those that have left.

    Attributes:
        gen_length: tokens of a canvas, G.
        tokens: int64 [B, T], every row its prompt, its canvas, and padding up to the longest.
        real: bool [B, T], False at padding; None where there is none.
        lengths: int64 [B], tokens of the prompts.
        prompts: for each row, which prompt it belongs to.
        generators: for each row, its random numbers; empty when none are needed.
        block: columns of the canvas that are being filled, first and one behind the last.
        left: masked tokens of the block in each row.

    Args:
        prompts: token ids, at least one per prompt.
        gen_length: tokens of a canvas, G.
        mask_id: id of the mask token.
        pad_id: id of the padding, and of what stands behind a stop id.
        stop_ids: ids that end a response.
        seeds: a seed per prompt, or none at all.
        device: device of the model.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        gen_length: int,
        mask_id: int,
        pad_id: int,
        stop_ids: Collection[int],
        seeds: Sequence[int],
        device: torch.device | str,
    ) -> None:
        self.gen_length = gen_length
        self.prompts = list(range(len(prompts)))
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._pad_id = pad_id
        self._stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64, device=device)
        self._num_tokens = [len(prompt) + gen_length for prompt in prompts]  # of every row, known to the host
        longest = max(self._num_tokens)
        rows = [
            [*prompt, *[mask_id] * gen_length, *[pad_id] * (longest - num_tokens)]
            for prompt, num_tokens in zip(prompts, self._num_tokens, strict=True)
        ]
        self.tokens = torch.tensor(rows, device=device)
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.real = self._real_tokens()
        self._canvases = self._canvas()
        self._prompt_index = torch.arange(len(prompts), device=device)  # `prompts`, on the device
        self.open_block(0, gen_length)

    def open_block(self, start: int, stop: int) -> None:
        """Turn to the columns [start, stop) of the canvas, all of them masked."""
        self.block = (start, stop)
        self.left = [stop - start] * len(self.prompts)
        self._masked = torch.ones(len(self.prompts), stop - start, dtype=torch.bool, device=self.tokens.device)

    def columns(self, start: int, stop: int) -> Tensor:
        """int64 [B, stop - start], where the columns [start, stop) of each canvas stand in its row."""
        return self.lengths[:, None] + torch.arange(start, stop, device=self.tokens.device)

    def first_masked(self, num_columns: int) -> tuple[Tensor, Tensor]:
        """The first columns of the block that are masked.

        Args:
            num_columns: how many in each row, m; rows with fewer masks are filled up with columns that have a token.

        Returns:
            Where they stand in their rows, int64 [B, m], and whether they are masked, bool [B, m].
        """
        offsets = (~self._masked).long().argsort(dim=1, stable=True)[:, :num_columns]
        return self.lengths[:, None] + self.block[0] + offsets, self._masked.gather(1, offsets)

    def commit(self, columns: Tensor, picked: Tensor, chosen: Tensor) -> None:
        """Write tokens where masks were; `left` is the caller's to keep, who may know it without asking the device.

        Args:
            columns: int64 [B, m], where they stand in their rows.
            picked: int64 [B, m], the tokens.
            chosen: bool [B, m], which of them are written; only masked ones.
        """
        self.tokens.scatter_(1, columns, torch.where(chosen, picked, self.tokens.gather(1, columns)))
        offsets = columns - self.lengths[:, None] - self.block[0]
        self._masked.scatter_(1, offsets, self._masked.gather(1, offsets) & ~chosen)

    def count_left(self) -> list[int]:
        """Masked tokens of the block in each row, read from the device."""
        counts: list[int] = self._masked.sum(1).tolist()
        return counts

    def close_block(self) -> None:
        """Let the rows leave that have a stop id, with padding behind the first one; after the last block, all."""
        canvas = self._canvas()
        is_stop = torch.isin(canvas, self._stop_ids)
        is_behind = is_stop.cumsum(1) > is_stop.long()
        self._canvases[self._prompt_index] = canvas.masked_fill(is_behind, self._pad_id)
        if self.block[1] == self.gen_length:
            self._keep([])
        elif len(self._stop_ids):
            self._keep([row for row, has_ended in enumerate(is_stop.any(1).tolist()) if not has_ended])

    def all_canvases(self) -> Tensor:
        """int64 [number of prompts, G], a copy of what is on the canvases, of rows that have left too."""
        canvases = self._canvases.clone()
        canvases[self._prompt_index] = self._canvas()
        return canvases

    def _canvas(self) -> Tensor:
        """int64 [B, G]."""
        return self.tokens.gather(1, self.columns(0, self.gen_length))

    def _real_tokens(self) -> Tensor | None:
        if len(set(self._num_tokens)) < 2:
            return None
        return torch.arange(self.tokens.size(1), device=self.tokens.device) < self.lengths[:, None] + self.gen_length

    def _keep(self, rows: list[int]) -> None:
        if len(rows) == len(self.prompts):
            return
        self._num_tokens = [self._num_tokens[row] for row in rows]
        self.prompts = [self.prompts[row] for row in rows]
        self.left = [self.left[row] for row in rows]
        self.generators = [self.generators[row] for row in rows] if self.generators else []
        self.tokens = self.tokens[rows, : max(self._num_tokens, default=0)]
        self.lengths = self.lengths[rows]
        self._prompt_index = self._prompt_index[rows]
        self.real = self._real_tokens()
