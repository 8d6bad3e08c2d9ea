"""From hidden states to one embedding a sequence.

Shape legend: B rows, T tokens of a row, D hidden, S sequences.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor


def pool(hidden: Tensor, sequence_ids: Tensor, num_sequences: int, *, layer_norm: bool = True) -> Tensor:
    """Mean of the hidden states of each sequence's visible tokens, then LayerNorm without affine parameters.

    A product with an averaging matrix: deterministic forward and backward, and cheap beside the model.

    Args:
        hidden: [B, T, D], hidden states after the final norm.
        sequence_ids: int64 [B, T], the sequence (from 0) whose mean a token enters; -1 for masked tokens and padding.
        num_sequences: S.
        layer_norm: normalize every mean over D.

    Returns:
        fp32 [S, D].
    """
    members = sequence_ids.flatten() == torch.arange(num_sequences, device=hidden.device)[:, None]  # [S, B * T]
    weights = members.float() / members.sum(1, keepdim=True).clamp(min=1)
    with _without_autocast(hidden.device.type):
        pooled = weights @ hidden.flatten(0, 1).float()
        return F.layer_norm(pooled, pooled.shape[-1:]) if layer_norm else pooled


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast would run the product in bf16; the meta device has none to switch off."""
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()
