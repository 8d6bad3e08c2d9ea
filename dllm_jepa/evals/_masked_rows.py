"""Scores of masked tokens: rows with holes go in, log-probabilities of what may stand in the holes come out.

Shape legend: B rows of a forward pass, T tokens of the longest one, l masked tokens of a row, c candidates for each,
n masked tokens of a forward pass, D hidden size, V vocabulary.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dllm_jepa.models import MaskedDiffusionLM

# Masked tokens of a forward pass: at the 126,464 ids of LLaDA their logits take 0.5 GB in bf16 and 1 GB in fp32.
MAX_MASKED_TOKENS = 2048


@dataclass(frozen=True)
class MaskedRow:
    """A sequence of which some tokens are hidden.

    Args:
        tokens: the clean token ids.
        masked: positions of the hidden ones, ascending; at least one.
        candidates: ids to score at each hidden position, as many at each; None scores the clean token.
    """

    tokens: Sequence[int]
    masked: Sequence[int]
    candidates: Sequence[Sequence[int]] | None = None


def draw_masked(key: str, stratum: int, num_strata: int, num_maskable: int) -> list[int]:
    """Which of L tokens stratum k of K masks, ascending: a pure function of its arguments.

    With u uniform in [0, 1), exactly l = ceil(L (k + u) / K) of the tokens are masked, each set of that size as likely
    as any other. Over all strata l is uniform on 1 ... L.

    Args:
        key: names the random numbers; equal keys draw equal ones.
        stratum: k, in [0, K).
        num_strata: K.
        num_maskable: L, at least 1.
    """
    digest = hashlib.blake2b(f"{stratum} {key}".encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))
    ratio = (stratum + generator.random()) / num_strata
    num_masked = max(1, math.ceil(num_maskable * ratio))  # of stratum 0 the ratio itself may be 0
    order = np.argsort(generator.random(num_maskable), kind="stable")
    return sorted(order[:num_masked].tolist())


@torch.no_grad()
def candidate_log_probs(
    model: MaskedDiffusionLM, rows: Sequence[MaskedRow], *, mask_id: int, batch_size: int
) -> list[Tensor]:
    """Log-probabilities of the candidates at the hidden positions, normalized over the vocabulary in fp32.

    The head of a bf16 model rounds its logits to 8 bits, where likely candidates often tie. So the logits of the
    candidates are computed anew in fp32; those of all other tokens, which only add up to the normalizer, stay rounded.

    The head scores hidden positions only. A forward pass has at most `batch_size` rows and `MAX_MASKED_TOKENS` hidden
    tokens, unless a single row has more. The model must be in evaluation mode.

    Returns:
        fp32 [l, c] on the CPU for every row, in nats.
    """
    device = next(model.parameters()).device
    weight = (model.backbone.tok_embeddings if model.head is None else model.head).weight  # [V, D]
    results: list[Tensor] = [torch.empty(0)] * len(rows)
    for batch in _batches(rows, batch_size):
        states, logits = _score_masked(model, [rows[index] for index in batch], mask_id, device)
        sizes = [len(rows[index].masked) for index in batch]
        for index, of_row, rounded in zip(batch, torch.split(states, sizes), torch.split(logits, sizes), strict=True):
            row = rows[index]
            listed = row.candidates or [[row.tokens[position]] for position in row.masked]
            candidates = torch.tensor(listed, device=device)  # [l, c]
            # A sum of products, since a GPU may be set to multiply fp32 matrices in fewer bits.
            chosen = (of_row.float().unsqueeze(1) * weight[candidates].float()).sum(-1)  # [l, c]
            # The logits in fp32 are twice as large, so they are made of one row at a time.
            normalizer = rounded.float().scatter(1, candidates, chosen).logsumexp(1, keepdim=True)
            results[index] = (chosen - normalizer).cpu()
    return results


def _batches(rows: Sequence[MaskedRow], batch_size: int) -> Iterator[list[int]]:
    """Numbers of the rows of each forward pass, longer ones first, so that little is padded."""
    batch: list[int] = []
    num_masked = 0
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index].tokens)):
        num_more = len(rows[index].masked)
        if batch and (len(batch) == batch_size or num_masked + num_more > MAX_MASKED_TOKENS):
            yield batch
            batch, num_masked = [], 0
        batch.append(index)
        num_masked += num_more
    if batch:
        yield batch


def _score_masked(
    model: MaskedDiffusionLM, rows: Sequence[MaskedRow], mask_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Final states [n, D] that the head scores hidden positions from, and logits [n, V], row after row."""
    num_tokens = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), num_tokens), mask_id)  # [B, T]; no token sees what stands behind a shorter row
    real = torch.zeros(len(rows), num_tokens, dtype=torch.bool)
    for number, row in enumerate(rows):
        tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
        tokens[number, list(row.masked)] = mask_id
        real[number, : len(row.tokens)] = True
    positions = [number * num_tokens + position for number, row in enumerate(rows) for position in row.masked]
    at = torch.tensor(positions, device=device)  # [n]
    attention_mask = None if bool(real.all()) else real.to(device)
    hidden = model(tokens.to(device), attention_mask=attention_mask)
    return model.scored_from(hidden, at, attention_mask), model.logits(hidden, at, attention_mask=attention_mask)
