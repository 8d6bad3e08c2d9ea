"""Likelihood of a response: the bound that a masked diffusion model is trained on, estimated by masking.

A masked diffusion model gives no probability of a whole response, but a lower bound on its logarithm:

    log p(response | prompt)  >=  E_l E_masked [ L / l * sum over masked tokens of log p(token | all others) ]

with l uniform on 1 ... L, for the L tokens of the response, and each set of l masked tokens equally likely. The bound
is what the model would reach on average if it filled in the response one token at a time, in random order.
"""

import itertools
import json
from collections.abc import Sequence

import torch
from torch import Tensor

from dllm_jepa.evals._masked_rows import MaskedRow, candidate_log_probs, draw_masked
from dllm_jepa.models import MaskedDiffusionLM


def conditional_log_likelihood(
    model: MaskedDiffusionLM,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    mask_id: int,
    num_samples: int = 128,
    seed: int = 0,
    batch_size: int = 16,
) -> Tensor:
    """Lower bound on log p(response | prompt), which is exact for a response of one token.

    A response with at most `num_samples` sets of masked tokens (up to 7 tokens for 128) is scored under each of them:
    the bound without noise. Otherwise there are `num_samples` draws, one for each stratum of the number of masked
    tokens: an unbiased estimate, without the noise that a random number of them would add.

    The random numbers depend on seed and prompt alone, so that the result does not depend on the batch (up to the
    rounding of padded rows), and responses of one length to one prompt are scored under the same masks.

    Args:
        model: the model, in evaluation mode.
        prompts: token ids, at least one for each response: a shifted model cannot score the first token of a row.
        responses: token ids, at least one each.
        mask_id: id of the mask token.
        num_samples: forward passes of a response, at most.
        seed: seed of the draws.
        batch_size: rows in one forward pass.

    Returns:
        fp64 [B] on the CPU, in nats.

    Raises:
        ValueError: an argument is out of range, or a row is longer than the model's context.

    Source: Nie et al. 2025, "Large Language Diffusion Models", equation 6 and algorithm 3, there with independent
    draws.
    """
    if len(prompts) != len(responses):
        raise ValueError(f"there must be one response for each prompt, got {len(prompts)} and {len(responses)}")
    if not all(prompts) or not all(responses):
        raise ValueError("every prompt and every response must have at least one token")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    longest = max((len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), default=0)
    if longest > model.sizes.max_seq_len:
        raise ValueError(f"prompt and response have {longest} tokens, the model's context is {model.sizes.max_seq_len}")
    rows: list[MaskedRow] = []
    weights: list[list[float]] = []  # of each row's log-probability, by response
    for prompt, response in zip(prompts, responses, strict=True):
        masks, mask_weights = _masks(list(prompt), len(response), num_samples, seed)
        tokens = [*prompt, *response]
        rows += [MaskedRow(tokens, [len(prompt) + position for position in mask]) for mask in masks]
        weights.append(mask_weights)
    log_probs = iter(candidate_log_probs(model, rows, mask_id=mask_id, batch_size=batch_size))
    estimates = [
        sum(weight * float(next(log_probs).double().sum()) for weight in mask_weights) for mask_weights in weights
    ]
    return torch.tensor(estimates, dtype=torch.float64)


def _masks(prompt: list[int], num_tokens: int, num_samples: int, seed: int) -> tuple[list[list[int]], list[float]]:
    """Sets of masked tokens of a response, and the weight of each in the sum."""
    if 2**num_tokens - 1 <= num_samples:
        sizes = range(1, num_tokens + 1)
        masks = [list(mask) for size in sizes for mask in itertools.combinations(range(num_tokens), size)]
        # L / l, over the L sizes and the sets of this size: 1 / (l * C(L, l)).
        num_sets = [sum(len(mask) == size for mask in masks) for size in sizes]
        return masks, [1 / (len(mask) * num_sets[len(mask) - 1]) for mask in masks]
    key = json.dumps([seed, prompt])
    masks = [draw_masked(key, stratum, num_samples, num_tokens) for stratum in range(num_samples)]
    return masks, [num_tokens / (len(mask) * num_samples) for mask in masks]
