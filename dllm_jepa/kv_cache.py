"""Keys and values kept between forward passes, so that a pass can feed some tokens of a row and attend to all.

Shape legend: B rows, T tokens of a row, m tokens that are fed, K key/value heads, h head size.
"""

from collections.abc import Hashable

import torch
from torch import Tensor


class KVCache:
    """Keys and values of all tokens of a batch; it travels through a backbone as its attention mask.

    The first pass feeds whole rows and fills the cache. Later passes feed some columns of every row, with their
    positions as `input_pos`: what is fed replaces its keys and values, and attends to those of the whole row. In a
    bidirectional model all states depend on all tokens, so what is not fed grows stale: such a pass is an
    approximation, until whole rows are fed again. Without gradients only: the tensors are written in place.

    Not a dataclass: FSDP rebuilds those at every unit that they pass, and what is kept here would be lost.

    Args:
        key_mask: bool [B, T], True at real tokens, which stand at the left of their rows; None when every token is
            real.
    """

    def __init__(self, key_mask: Tensor | None) -> None:
        """An empty cache."""
        self.key_mask = key_mask
        self._kept: dict[Hashable, tuple[Tensor, Tensor]] = {}

    def update(self, layer: Hashable, k: Tensor, v: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keep what an attention layer has computed.

        Args:
            layer: identifies the layer: its attention module.
            k: keys [B, m, K, h], rotated.
            v: values [B, m, K, h].
            columns: int64 [B, m], columns of the fed tokens; None when whole rows are fed.

        Returns:
            Keys and values [B, T, K, h] of the whole rows.

        Raises:
            ValueError: if columns are fed before whole rows were.
        """
        if columns is None:
            self._kept[layer] = k, v
            return k, v
        if layer not in self._kept:
            raise ValueError("a KVCache must be filled by a pass over whole rows (no input_pos) before columns are fed")
        keys, values = self._kept[layer]
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        keys[rows, columns] = k
        values[rows, columns] = v
        return keys, values

    def keep(self, rows: list[int]) -> None:
        """Forget all rows but these, which are the ones that later passes feed."""
        if self.key_mask is not None:
            self.key_mask = self.key_mask[rows]
        for layer, (keys, values) in self._kept.items():
            self._kept[layer] = keys[rows], values[rows]
