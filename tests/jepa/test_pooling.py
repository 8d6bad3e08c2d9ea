"""One embedding a sequence, against sums written out by hand."""

import math

import pytest
import torch
from torch import Tensor

from dllm_jepa.jepa import pool

LAYER_NORM_EPSILON = 1e-5
"""PyTorch's default; the method names none."""


def pool_by_hand(hidden: Tensor, sequence_ids: Tensor, num_sequences: int, *, layer_norm: bool) -> list[list[float]]:
    """Python sums over [B, T, D] and [B, T], in double precision."""
    embed_dim = hidden.size(-1)
    pooled = []
    for sequence in range(num_sequences):
        total, count = [0.0] * embed_dim, 0
        for row in range(hidden.size(0)):
            for position in range(hidden.size(1)):
                if int(sequence_ids[row, position]) == sequence:
                    count += 1
                    for d in range(embed_dim):
                        total[d] += float(hidden[row, position, d])
        mean = [value / count for value in total]
        if layer_norm:
            centre = sum(mean) / embed_dim
            variance = sum((value - centre) ** 2 for value in mean) / embed_dim
            mean = [(value - centre) / math.sqrt(variance + LAYER_NORM_EPSILON) for value in mean]
        pooled.append(mean)
    return pooled


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1


# Three sequences of 5, 3 and 1 visible tokens, masked tokens and padding between them; one spans no fixed place.
IDS = torch.tensor([[0, -1, 0, 0, 1, -1, 1], [-1, 0, 0, 2, -1, -1, 1]])


@pytest.mark.parametrize("layer_norm", [True, False])
def test_pooled_by_hand(hidden: Tensor, layer_norm: bool) -> None:
    pooled = pool(hidden, IDS, 3, layer_norm=layer_norm)
    assert pooled.shape == (3, 5) and pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, torch.tensor(pool_by_hand(hidden, IDS, 3, layer_norm=layer_norm)))


def test_layer_norm_is_the_default_and_has_no_weights(hidden: Tensor) -> None:
    pooled = pool(hidden, IDS, 3)
    torch.testing.assert_close(pooled.mean(-1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(pooled.square().mean(-1), torch.ones(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_masked_tokens_and_padding_count_for_nothing(hidden: Tensor, layer_norm: bool) -> None:
    changed = torch.where((IDS < 0)[..., None], torch.full_like(hidden, 1e3), hidden)
    assert torch.equal(pool(changed, IDS, 3, layer_norm=layer_norm), pool(hidden, IDS, 3, layer_norm=layer_norm))


def test_gradient_is_shared_by_the_visible_tokens(hidden: Tensor) -> None:
    hidden.requires_grad_()
    pool(hidden, IDS, 3, layer_norm=False).sum().backward()
    sizes = {-1: math.inf, 0: 5, 1: 3, 2: 1}
    expected = torch.tensor([[1 / sizes[int(i)] for i in row] for row in IDS])[..., None].expand_as(hidden)
    torch.testing.assert_close(hidden.grad, expected)


def test_one_row_or_several_give_the_same(hidden: Tensor) -> None:
    packed = pool(hidden.reshape(1, 14, 5), IDS.reshape(1, 14), 3)
    assert torch.equal(packed, pool(hidden, IDS, 3))


def test_bf16_states_are_averaged_in_fp32(hidden: Tensor) -> None:
    states = hidden.bfloat16()
    expected = torch.tensor(pool_by_hand(states, IDS, 3, layer_norm=True))
    torch.testing.assert_close(pool(states, IDS, 3), expected)
    with torch.autocast("cpu", torch.bfloat16):
        inside = pool(states, IDS, 3)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, expected)


def test_no_sequence_gives_no_row() -> None:
    hidden = torch.randn(1, 1, 5, requires_grad=True)
    pooled = pool(hidden, torch.full((1, 1), -1), 0)
    assert pooled.shape == (0, 5)
    pooled.sum().backward()
    assert hidden.grad is not None and torch.equal(hidden.grad, torch.zeros(1, 1, 5))
