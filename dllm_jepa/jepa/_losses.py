"""The two losses, as local sums over global counts.

Every function returns a sum over the sequences of one micro-batch, divided by counts of the whole global batch. Sums
over micro-batches and ranks then give the loss of the batch, however it was split.

Shape legend: S sequences of a micro-batch, n masked tokens of its context views, V vocabulary, D hidden.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossWeight = Literal["mean", "inverse_ratio", "token"]

NUM_BANDS = 5
"""Mask-ratio bands of the reported losses: (0, 0.2], (0.2, 0.4], ..., (0.8, 1]."""


@dataclass(frozen=True)
class GlobalCounts:
    """Counts over all ranks and all micro-batches of a step, known before its first forward.

    Args:
        sequences: sequences of the global batch.
        masked_tokens: masked tokens of their context views.
        tokens: their tokens, padding excluded.
        processed_tokens: positions that the model processes, padding included.
        squared_lengths: sum over the sequences of their squared lengths, padding excluded.
    """

    sequences: int
    masked_tokens: int
    tokens: int
    processed_tokens: int
    squared_lengths: int

    def sizes(self) -> dict[str, int]:
        """What the work of a step grows with, padding excluded."""
        return {
            "tokens": self.tokens,
            "squared_lengths": self.squared_lengths,
            "scored": self.masked_tokens,
            "sequences": self.sequences,
        }

    def metrics(self) -> dict[str, float]:
        """What a run reports of them; `padding` is a fraction in [0, 1) of the processed tokens."""
        return {
            "tokens": self.tokens,
            "masked_tokens": self.masked_tokens,
            "sequences": self.sequences,
            "padding": 1 - self.tokens / self.processed_tokens,
        }


def masked_token_weights(
    loss_weight: LossWeight,
    counts: GlobalCounts,
    *,
    sequence_of_masked: Tensor,
    mask_ratio: Tensor,
    num_masked: Tensor,
    num_maskable: Tensor,
) -> Tensor:
    """Weight of each masked token in L_diff.

    Args:
        loss_weight: "mean": 1/|M_t| a sequence (the paper); "inverse_ratio": 1/t a token over the maskable tokens of
            its sequence (LLaDA); "token": every masked token of the global batch counts the same.
        counts: counts of the global batch.
        sequence_of_masked: int64 [n], sequence of each masked token.
        mask_ratio: fp32 [S], t in (0, 1].
        num_masked: int64 [S], |M_t|.
        num_maskable: int64 [S].

    Returns:
        fp32 [n]; L_diff is the sum over all masked tokens of weight times loss.
    """
    if loss_weight == "token":
        return torch.full_like(sequence_of_masked, 1.0 / counts.masked_tokens, dtype=torch.float32)
    if loss_weight == "mean":
        per_sequence = 1.0 / (num_masked.float() * counts.sequences)
    else:
        per_sequence = 1.0 / (mask_ratio * num_maskable.float() * counts.sequences)
    return per_sequence[sequence_of_masked]


def jepa_loss(target: Tensor, pred: Tensor, counts: GlobalCounts) -> Tensor:
    """Cosine distance between predicted and target embeddings, in fp32.

    Args:
        target: [S, D], embeddings of the target views; no gradient flows into it.
        pred: [S, D], the predictor's output.
        counts: counts of the global batch.

    Returns:
        fp32 scalar, sum over sequences of (1 - cos(target, pred)) over the number of sequences of the global batch.
    """
    cosine = F.cosine_similarity(target.detach().float(), pred.float(), dim=-1)  # [S]
    return (1 - cosine).sum() / counts.sequences


def band_sums(
    token_loss: Tensor,
    *,
    sequence_of_masked: Tensor,
    mask_ratio: Tensor,
    num_masked: Tensor,
    num_maskable: Tensor,
) -> dict[str, tuple[Tensor, Tensor]]:
    """What a micro-batch adds to the mean loss of each mask-ratio band.

    Args:
        token_loss: fp32 [n], -log p(x0_i | context view) of each masked token.
        sequence_of_masked: int64 [n].
        mask_ratio: fp32 [S].
        num_masked: int64 [S].
        num_maskable: int64 [S], not used here.

    Returns:
        For each band, as `diffusion_loss_{low}_{high}`, two fp32 scalars: the sum over its sequences of their mean
        masked-token loss, and their number.
    """
    sequence_loss = torch.zeros_like(mask_ratio).index_add(0, sequence_of_masked, token_loss.detach().to(mask_ratio))
    sequence_loss = sequence_loss / num_masked.clamp(min=1)
    # The small step back keeps a ratio of exactly 0.2 in the first band despite its rounding.
    band = (torch.ceil(mask_ratio * NUM_BANDS - 1e-5).long() - 1).clamp(0, NUM_BANDS - 1)  # [S]
    bands = mask_ratio.new_zeros(NUM_BANDS, 2)
    bands.index_add_(0, band, torch.stack((sequence_loss, torch.ones_like(sequence_loss)), dim=1))
    names = (f"diffusion_loss_{band / NUM_BANDS:.1f}_{(band + 1) / NUM_BANDS:.1f}" for band in range(NUM_BANDS))
    return {name: (total, count) for name, (total, count) in zip(names, bands, strict=True)}
