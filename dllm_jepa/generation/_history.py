"""What was filled in on the canvases of a batch, and when.

Shape legend: B rows, G tokens of a canvas.
"""

import torch
from torch import Tensor


class CanvasHistory:
    """Follows the canvases of a decoding step by step.

    Attributes:
        tokens: int64 [B, G] on the CPU, the tokens as they were sampled; masks where none was. Behind the end of a
            response a decoding leaves padding, which is not sampled.
        filled_at: int64 [B, G], the step that filled each token, from 1; 0 where none did.
        num_steps: steps so far.

    Args:
        num_rows: canvases, B.
        gen_length: tokens of a canvas, G.
        block_length: tokens of a block; one block is filled at a time, in all rows at once.
        mask_id: id of the mask token.
    """

    def __init__(self, num_rows: int, *, gen_length: int, block_length: int, mask_id: int) -> None:
        self.tokens = torch.full((num_rows, gen_length), mask_id)
        self.filled_at = torch.zeros_like(self.tokens)
        self.num_steps = 0
        self._mask_id = mask_id
        self._masked = torch.ones_like(self.tokens, dtype=torch.bool)
        self._blocks = torch.arange(gen_length) // block_length

    def add(self, canvas: Tensor) -> None:
        """Take in the canvases after one more step.

        Args:
            canvas: int64 [B, G], masks included, on the CPU.
        """
        self.num_steps += 1
        masked = canvas == self._mask_id
        is_new = self._masked & ~masked
        self._masked = masked
        # What appears in later blocks at the same time is the padding of rows that are finished.
        first_block = self._blocks[is_new.any(0)].min() if is_new.any() else 0
        is_new &= self._blocks == first_block
        self.tokens[is_new] = canvas[is_new]
        self.filled_at[is_new] = self.num_steps
