"""The library's calls, in the order of a recipe, against plain loops in double precision."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dllm_jepa.data import MicroBatch
from dllm_jepa.data._collate import collate
from dllm_jepa.jepa import (
    EMATargetEncoder,
    GlobalCounts,
    LossWeight,
    ViewSampler,
    jepa_loss,
    masked_token_weights,
    pool,
    transformer_predictor,
)
from dllm_jepa.models.dream import dream
from dllm_jepa.models.llada import llada
from tests.numerics.plain_loops import Parts, Sequence, assert_gradients_close, losses_by_hand, use_double_precision

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "embed_dim": 16,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 20,
}
MASK_ID, PAD_ID = 30, 29
LENGTHS = [9, 2, 13, 4, 6, 17, 3]
# Micro-batches of a step: of one sequence, of several, and of none.
SPLITS = {"whole": [[0, 1, 2, 3, 4, 5, 6]], "split": [[4, 0, 6], [], [2], [5, 1, 3]]}
JEPA_WEIGHT = 0.5
FAMILIES = {"llada": llada, "dream": dream}


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    use_double_precision(monkeypatch)


def build_parts(family: str) -> Parts:
    model, other = (FAMILIES[family](**SIZES, max_seq_len=32) for _ in range(2))
    parts = Parts(
        model.double(),
        transformer_predictor(16, 20, num_layers=2).double(),
        EMATargetEncoder(other.backbone, ema_decay=0.9),
    )
    parts.target_encoder.backbone.double()
    parts.randomize()
    return parts


def draw_ratios(generator: np.random.Generator) -> tuple[float, float]:
    """Ratios that fp32 holds exactly."""
    return float(generator.choice([0.125, 0.25, 0.5])), 0.75


def draw_sequences(shift_logits: bool) -> list[Sequence]:
    generator = np.random.default_rng(0)
    sampler = ViewSampler(draw_ratios, exact_count=False, nested=False)
    drawn = []
    for index, length in enumerate(LENGTHS):
        tokens = generator.integers(0, 29, length)
        # Some have no prompt: there only the shift keeps the first token from being masked.
        maskable = np.arange(length) >= (index % 2) * (length // 3)
        maskable[0] &= not shift_logits
        drawn.append((tokens, maskable, sampler(tokens, maskable, mask_id=MASK_ID, seed=1, epoch=0, index=index)))
    return drawn


def losses_by_library(
    parts: Parts, micro_batches: list[MicroBatch], *, loss_weight: LossWeight, layer_norm: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same calls as a recipe; L_diff and L_jepa of each micro-batch in turn."""
    counts = GlobalCounts(
        sum(batch.num_sequences for batch in micro_batches), sum(len(batch.labels) for batch in micro_batches), 1, 1, 1
    )
    for batch in micro_batches:
        packing = {"mask": batch.attention_mask, "input_pos": batch.input_pos}
        target = parts.target_encoder.embed(
            batch.target, batch.target_ids, batch.num_sequences, layer_norm=layer_norm, **packing
        )
        hidden = parts.model(batch.context, attention_mask=batch.attention_mask, input_pos=batch.input_pos)
        diffusion, _ = parts.model.score(
            hidden,
            batch.masked_positions,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            token_weights=masked_token_weights(loss_weight, counts, **batch.loss_counts()),
            chunk_tokens=5,
        )
        pred = parts.predictor(pool(hidden, batch.context_ids, batch.num_sequences, layer_norm=layer_norm))
        yield diffusion, jepa_loss(target, pred, counts)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("family", "packed", "layer_norm", "loss_weight"),
    [  # every pair of values
        ("llada", True, True, "mean"),
        ("dream", False, False, "mean"),
        ("llada", False, True, "inverse_ratio"),
        ("dream", True, False, "inverse_ratio"),
        ("dream", True, True, "token"),
        ("llada", False, False, "token"),
    ],
)
def test_losses_and_gradients_equal_plain_loops(
    family: str, packed: bool, layer_norm: bool, loss_weight: LossWeight
) -> None:
    parts = build_parts(family)
    sequences = draw_sequences(parts.model.shift_logits)
    expected = losses_by_hand(parts, sequences, loss_weight=loss_weight, layer_norm=layer_norm)
    (expected[0] + JEPA_WEIGHT * expected[1]).backward()
    expected_gradients = parts.take_gradients()
    # 1 / (number of masked tokens) is the one number that stays in fp32.
    tolerance = 1e-6 if loss_weight == "token" else 1e-9

    for split in SPLITS.values():
        micro_batches = [
            collate([sequences[m] for m in members], members, pad_id=PAD_ID, packed=packed) for members in split
        ]
        found = [0.0, 0.0]
        for losses in losses_by_library(parts, micro_batches, loss_weight=loss_weight, layer_norm=layer_norm):
            (losses[0] + JEPA_WEIGHT * losses[1]).backward()
            found = [total + loss.item() for total, loss in zip(found, losses, strict=True)]
        assert found[0] == pytest.approx(expected[0].item(), rel=tolerance)
        assert found[1] == pytest.approx(expected[1].item(), rel=1e-9)
        assert_gradients_close(parts.take_gradients(), expected_gradients, tolerance)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_backbone_and_predictor_and_never_the_target(family: str) -> None:
    parts = build_parts(family)
    sequences = draw_sequences(parts.model.shift_logits)
    batch = collate(sequences, range(len(sequences)), pad_id=PAD_ID, packed=True)

    def reached(which: int) -> set[str]:
        losses = next(losses_by_library(parts, [batch], loss_weight="mean", layer_norm=True))
        losses[which].backward()
        return {name for name, gradient in parts.take_gradients().items() if gradient.any()}

    everything = set(parts.trained())
    backbone = {name for name in everything if name.startswith("model.backbone.")}
    predictor = {name for name in everything if name.startswith("predictor.")}
    assert backbone and predictor
    assert reached(0) == everything - predictor
    assert reached(1) == backbone | predictor
    assert all(param.grad is None for param in parts.target_encoder.backbone.parameters())


@pytest.mark.usefixtures("exact")
def test_the_jepa_gradient_is_the_slope_with_the_target_held_still() -> None:
    """Central differences along a random direction, in the online weights and in the target's."""
    parts = build_parts("dream")
    sequences = draw_sequences(shift_logits=True)
    batch = collate(sequences, range(len(sequences)), pad_id=PAD_ID, packed=True)

    def loss() -> Tensor:
        diffusion, alignment = next(losses_by_library(parts, [batch], loss_weight="mean", layer_norm=True))
        return diffusion + JEPA_WEIGHT * alignment

    def slope(params: list[nn.Parameter], directions: list[Tensor], width: float = 1e-5) -> float:
        values = []
        for distance in (width, -2 * width, width):
            with torch.no_grad():
                for param, direction in zip(params, directions, strict=True):
                    param.add_(direction, alpha=distance)
                values.append(loss().item())
        return (values[0] - values[1]) / (2 * width)

    loss().backward()
    online = list(parts.trained().values())
    directions = [torch.randn_like(param) for param in online]
    predicted = sum(float((p.grad * d).sum()) for p, d in zip(online, directions, strict=True) if p.grad is not None)
    assert slope(online, directions) == pytest.approx(predicted, rel=1e-6)

    frozen = list(parts.target_encoder.backbone.parameters())
    assert abs(slope(frozen, [torch.randn_like(param) for param in frozen])) > 1e-3
    assert all(param.grad is None for param in frozen)
