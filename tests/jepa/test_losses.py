"""The losses as sums over micro-batches, against plain loops in double precision."""

import math
import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_jepa.jepa import GlobalCounts, LossWeight, band_sums, jepa_loss, masked_token_weights

VOCAB_SIZE, EMBED_DIM = 13, 6
LOSS_WEIGHTS: list[LossWeight] = ["mean", "inverse_ratio", "token"]


@dataclass
class Batch:
    """A global batch: for each sequence the logits [masked, V], labels, embeddings [D], ratio and maskable tokens."""

    logits: list[Tensor]
    labels: list[list[int]]
    pred: list[Tensor]
    target: list[Tensor]
    mask_ratio: list[float]
    num_maskable: list[int]

    @property
    def counts(self) -> GlobalCounts:
        masked = sum(len(labels) for labels in self.labels)
        return GlobalCounts(len(self.labels), masked, tokens=100, processed_tokens=120, squared_lengths=2000)

    def part(self, members: list[int]) -> dict[str, Tensor]:
        """The fields of a micro-batch that weigh its losses."""
        return {
            "sequence_of_masked": torch.tensor(
                [slot for slot, member in enumerate(members) for _ in self.labels[member]], dtype=torch.int64
            ),
            "mask_ratio": torch.tensor([self.mask_ratio[m] for m in members], dtype=torch.float32),
            "num_masked": torch.tensor([len(self.labels[m]) for m in members], dtype=torch.int64),
            "num_maskable": torch.tensor([self.num_maskable[m] for m in members], dtype=torch.int64),
        }


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(0)
    draw = random.Random(0)
    num_masked = [1, 5, 2, 9, 1, 3, 7]
    return Batch(
        logits=[(4 * torch.randn(n, VOCAB_SIZE)).requires_grad_() for n in num_masked],
        labels=[[draw.randrange(VOCAB_SIZE) for _ in range(n)] for n in num_masked],
        pred=[torch.randn(EMBED_DIM).requires_grad_() for _ in num_masked],
        target=[torch.randn(EMBED_DIM) for _ in num_masked],
        mask_ratio=[0.05, 0.4, 0.25, 0.99, 0.2, 0.6, 1.0],
        num_maskable=[11, 14, 9, 9, 4, 6, 7],
    )


def negative_log_probability(scores: list[float], label: int) -> float:
    top = max(scores)
    return top + math.log(sum(math.exp(score - top) for score in scores)) - scores[label]


def diffusion_loss_by_hand(batch: Batch, loss_weight: LossWeight) -> float:
    """L_diff as method.md words it: sequence by sequence, token by token."""
    total, tokens = 0.0, 0
    for logits, labels, ratio, maskable in zip(
        batch.logits, batch.labels, batch.mask_ratio, batch.num_maskable, strict=True
    ):
        losses = [negative_log_probability(row, label) for row, label in zip(logits.tolist(), labels, strict=True)]
        if loss_weight == "mean":
            total += sum(losses) / len(losses)
        elif loss_weight == "inverse_ratio":
            total += sum(loss / ratio for loss in losses) / maskable
        else:
            total, tokens = total + sum(losses), tokens + len(losses)
    return total / (tokens if loss_weight == "token" else len(batch.labels))


def jepa_loss_by_hand(batch: Batch) -> float:
    total = 0.0
    for pred, target in zip(batch.pred, batch.target, strict=True):
        dot = sum(a * b for a, b in zip(pred.tolist(), target.tolist(), strict=True))
        total += 1 - dot / math.sqrt(sum(a * a for a in pred.tolist()) * sum(b * b for b in target.tolist()))
    return total / len(batch.pred)


Bands = dict[str, tuple[Tensor, Tensor]]
BANDS = [f"diffusion_loss_{name}" for name in ("0.0_0.2", "0.2_0.4", "0.4_0.6", "0.6_0.8", "0.8_1.0")]


def step(batch: Batch, split: list[list[int]], loss_weight: LossWeight) -> tuple[float, float, list[Tensor], Bands]:
    """Both losses, all gradients and the sums of the bands from micro-batches, empty ones included."""
    for leaf in (*batch.logits, *batch.pred):
        leaf.grad = None
    bands = dict.fromkeys(BANDS, (torch.zeros(()), torch.zeros(())))
    diffusion_total, alignment_total = 0.0, 0.0
    for members in split:
        logits = torch.cat([torch.zeros(0, VOCAB_SIZE), *(batch.logits[m] for m in members)])
        labels = torch.tensor([label for m in members for label in batch.labels[m]], dtype=torch.int64)
        pred = torch.stack([batch.pred[m] for m in members]) if members else torch.zeros(0, EMBED_DIM)
        target = torch.stack([batch.target[m] for m in members]) if members else torch.zeros(0, EMBED_DIM)
        token_loss = F.cross_entropy(logits, labels, reduction="none")
        weights = masked_token_weights(loss_weight, batch.counts, **batch.part(members))
        diffusion, alignment = (weights * token_loss).sum(), jepa_loss(target, pred, batch.counts)
        if members:
            (diffusion + 0.5 * alignment).backward()
        for name, (total, count) in band_sums(token_loss, **batch.part(members)).items():
            bands[name] = (bands[name][0] + total, bands[name][1] + count)
        diffusion_total += diffusion.item()
        alignment_total += alignment.item()
    gradients = [leaf.grad.clone() for leaf in (*batch.logits, *batch.pred) if leaf.grad is not None]
    return diffusion_total, alignment_total, gradients, bands


@pytest.mark.parametrize("loss_weight", LOSS_WEIGHTS)
def test_losses_equal_plain_loops(batch: Batch, loss_weight: LossWeight) -> None:
    diffusion, alignment, _, _ = step(batch, [[*range(7)]], loss_weight)
    assert diffusion == pytest.approx(diffusion_loss_by_hand(batch, loss_weight), rel=1e-6)
    assert alignment == pytest.approx(jepa_loss_by_hand(batch), rel=1e-6)


@pytest.mark.parametrize("loss_weight", LOSS_WEIGHTS)
def test_any_split_gives_the_same_losses_and_gradients(batch: Batch, loss_weight: LossWeight) -> None:
    draw = random.Random(1)
    whole = step(batch, [[*range(7)]], loss_weight)
    assert len(whole[2]) == 14
    for _ in range(20):
        split: list[list[int]] = [[] for _ in range(draw.randrange(1, 9))]
        for member in draw.sample(range(7), 7):
            draw.choice(split).append(member)
        parts = step(batch, split, loss_weight)
        assert parts[0] == pytest.approx(whole[0], rel=1e-6)
        assert parts[1] == pytest.approx(whole[1], rel=1e-6)
        torch.testing.assert_close(parts[2], whole[2], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(parts[3], whole[3], rtol=1e-5, atol=1e-6)


def test_cosines_are_computed_in_fp32() -> None:
    """Vectors so alike that bf16 could not tell their cosine from 1."""
    torch.manual_seed(0)
    target = torch.randn(4, 64).bfloat16()
    pred = (target.float() + 0.05 * torch.randn(4, 64)).bfloat16()
    loss = jepa_loss(target, pred, GlobalCounts(4, 4, 4, 4, 4))
    a, b = target.double(), pred.double()
    expected = (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
    assert loss.dtype == torch.float32 and 0 < float(expected) < 0.004
    assert float(loss) == pytest.approx(float(expected), rel=1e-3)


def test_jepa_loss_sees_directions_only() -> None:
    torch.manual_seed(0)
    counts, pred = GlobalCounts(5, 5, 5, 5, 5), torch.randn(5, EMBED_DIM)
    assert float(jepa_loss(3 * pred, pred, counts)) == pytest.approx(0, abs=1e-6)
    assert float(jepa_loss(-pred, pred, counts)) == pytest.approx(2, abs=1e-6)


def test_no_gradient_flows_into_the_target() -> None:
    target = torch.randn(3, EMBED_DIM, requires_grad=True)
    pred = torch.randn(3, EMBED_DIM, requires_grad=True)
    jepa_loss(target, pred, GlobalCounts(3, 3, 3, 3, 3)).backward()
    assert target.grad is None and pred.grad is not None and bool(pred.grad.abs().max() > 0)


@pytest.mark.parametrize("loss_weight", LOSS_WEIGHTS)
def test_a_micro_batch_without_sequences_counts_for_nothing(loss_weight: LossWeight) -> None:
    """Logits [0, V]: every loss is an exact zero that a backward can start from."""
    counts = GlobalCounts(4, 9, 20, 20, 100)
    hidden = torch.randn(1, 1, EMBED_DIM, requires_grad=True)
    head = torch.randn(VOCAB_SIZE, EMBED_DIM, requires_grad=True)
    nowhere = torch.zeros(0, dtype=torch.int64)
    fields = {
        "sequence_of_masked": nowhere,
        "mask_ratio": torch.zeros(0),
        "num_masked": nowhere,
        "num_maskable": nowhere,
    }
    token_loss = F.cross_entropy(hidden.flatten(0, 1)[nowhere] @ head.T, nowhere, reduction="none")
    diffusion = (masked_token_weights(loss_weight, counts, **fields) * token_loss).sum()
    alignment = jepa_loss(torch.zeros(0, EMBED_DIM), hidden.flatten(0, 1)[nowhere], counts)
    bands = band_sums(token_loss, **fields)
    (diffusion + alignment).backward()
    assert diffusion.item() == alignment.item() == 0
    assert all(total == count == 0 for total, count in bands.values())
    for leaf in (hidden, head):
        assert leaf.grad is not None and torch.equal(leaf.grad, torch.zeros_like(leaf))


def bands_with_sequences(sums: Bands) -> dict[str, float]:
    return {name: float(total / count) for name, (total, count) in sums.items() if count}


def test_bands_are_means_over_their_sequences(batch: Batch) -> None:
    """Whatever the loss weight. Ratios .05 and .2; .25 and .4; .6; none; .99 and 1: an upper end is of its band."""
    members = {"0.0_0.2": [0, 4], "0.2_0.4": [1, 2], "0.4_0.6": [5], "0.8_1.0": [3, 6]}
    for loss_weight in LOSS_WEIGHTS:
        _, _, _, sums = step(batch, [[6, 0, 2], [1, 5], [3, 4]], loss_weight)
        bands = bands_with_sequences(sums)
        assert bands.keys() == {f"diffusion_loss_{name}" for name in members}
        for name, sequences in members.items():
            means = []
            for m in sequences:
                rows = zip(batch.logits[m].tolist(), batch.labels[m], strict=True)
                means.append(sum(negative_log_probability(row, y) for row, y in rows) / len(batch.labels[m]))
            assert bands[f"diffusion_loss_{name}"] == pytest.approx(sum(means) / len(means), rel=1e-6)


@pytest.mark.parametrize("low", [0.0, 0.2, 0.4, 0.6, 0.8])
def test_every_ratio_has_its_band(low: float) -> None:
    """(low, low + 0.2]."""
    for ratio in (low + 0.001, low + 0.1, low + 0.2):
        fields = {"sequence_of_masked": torch.tensor([0]), "num_masked": torch.tensor([1])}
        sums = band_sums(
            torch.tensor([3.0]),
            mask_ratio=torch.tensor([ratio], dtype=torch.float32),
            num_maskable=torch.tensor([4]),
            **fields,
        )
        assert bands_with_sequences(sums) == {f"diffusion_loss_{low:.1f}_{low + 0.2:.1f}": 3}


def test_reported_counts() -> None:
    counts = GlobalCounts(sequences=4, masked_tokens=10, tokens=30, processed_tokens=40, squared_lengths=300)
    assert counts.metrics() == {"tokens": 30, "masked_tokens": 10, "sequences": 4, "padding": 0.25}
    assert counts.sizes() == {"tokens": 30, "squared_lengths": 300, "scored": 10, "sequences": 4}


def test_autocast_does_not_change_the_jepa_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    target, pred = torch.randn(2, 7, 33, generator=generator)
    counts = GlobalCounts(9, 1, 1, 1, 1)
    values = []
    for enabled in (False, True):
        leaf = pred.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = jepa_loss(target, leaf, counts)
        loss.backward()
        values.append((loss, leaf.grad))
    assert values[0][0].dtype == values[1][0].dtype == torch.float32
    assert torch.equal(values[0][0], values[1][0]) and torch.equal(values[0][1], values[1][1])
