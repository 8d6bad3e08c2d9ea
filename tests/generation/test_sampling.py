"""Which token is picked and how sure it is, against closed forms; the rules of the schedules."""

import math

import pytest
import torch
from torch import Tensor

from dllm_jepa.generation import (
    CONFIDENCES,
    EvenSpread,
    Factor,
    NoiseLevels,
    RowNoise,
    Sampling,
    Threshold,
    dream_decoding,
)
from tests.generation.scripted import Scripted

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 4.0])  # id 6 is the mask
MASK = 6
NUM = 4000


def shares(sampling: Sampling) -> Tensor:
    """How often each id is picked, of NUM independent positions with the same logits."""
    decoding = dream_decoding(gen_length=NUM, steps=1, algorithm="maskgit_plus")
    decoding = type(decoding)(NUM, NUM, decoding.schedule, sampling, "probability")
    model = Scripted(LOGITS.expand(NUM + 1, 7))
    canvas = decoding.generate(model, [[0]], mask_id=MASK, pad_id=0, seeds=[0]).canvas
    return torch.bincount(canvas.flatten(), minlength=7) / NUM


def close(given: Tensor, expected: Tensor) -> bool:
    """Within four standard errors of a share."""
    return bool((given - expected).abs().max() < 4 * (0.25 / NUM) ** 0.5)


def test_temperature_samples_from_the_softmax() -> None:
    for temperature in (0.3, 2.0):
        assert close(shares(Sampling(temperature))[:MASK], (LOGITS[:MASK] / temperature).softmax(0))
    assert shares(Sampling())[0] == 1.0


def test_top_k() -> None:
    kept = shares(Sampling(1.0, top_k=4))  # the mask is one of the four, and is not picked
    assert close(kept[:3], LOGITS[:3].softmax(0)) and kept[3:].sum() == 0
    assert close(shares(Sampling(1.0, top_k=50))[:MASK], LOGITS[:MASK].softmax(0))


def test_top_p() -> None:
    probabilities = LOGITS.softmax(0)  # in order: mask 0.81, 0.11, 0.04, ...
    for top_p, kept in ((0.9, 1), (0.93, 2), (1.0, 6)):
        given = shares(Sampling(1.0, top_p=top_p))
        assert (probabilities[MASK] + probabilities[: kept - 1].sum() <= top_p) or kept == 1
        assert close(given[:kept], LOGITS[:kept].softmax(0)) and given[kept:].sum() == 0


def test_the_likeliest_token_is_never_cut() -> None:
    logits, banned = LOGITS.expand(1, 1, 7), torch.arange(7) == 5
    for sampling in (
        Sampling(1.0, top_p=1e-6, sharpen_confidence=True),
        Sampling(1.0, top_k=1, sharpen_confidence=True),
    ):
        picked, scores = sampling(logits, banned, noise())
        assert picked.item() == 6 and CONFIDENCES["probability"](scores, picked, noise()) == 1.0


def test_where_only_the_mask_is_left_the_likeliest_other_id_is_found() -> None:
    """The mask alone has more than half of the probability: of all others, none is left."""
    for sampling in (Sampling(1.0, top_p=0.5), Sampling(1.0, top_k=1), Sampling(0.0, top_p=0.5)):
        picked = shares(sampling)
        assert picked[MASK] == 0
        assert picked[0] == 1.0 if sampling.temperature == 0 else close(picked[:MASK], LOGITS[:MASK].softmax(0))


def test_where_confidences_are_measured() -> None:
    """LLaDA measures in the model's own distribution, Dream after temperature and cuts."""
    logits, banned = LOGITS.expand(1, 1, 7), torch.zeros(7, dtype=torch.bool)
    picked = torch.tensor([[6]])
    for sharpen, expected in (
        (False, LOGITS.softmax(0)[6]),
        (True, torch.tensor([2.0 / 0.5, 4.0 / 0.5]).softmax(0)[1]),
    ):
        _, scores = Sampling(0.5, top_k=2, sharpen_confidence=sharpen)(logits, banned, noise())
        torch.testing.assert_close(CONFIDENCES["probability"](scores, picked, noise()), expected.view(1, 1))


def noise() -> RowNoise:
    return RowNoise([torch.Generator().manual_seed(0)], [1], 1)


def test_confidences() -> None:
    scores = torch.tensor([[[0.0, 1.0, 3.0], [5.0, 5.0, 5.0]]])
    picked = torch.tensor([[1, 0]])
    p = scores.softmax(-1)[0]
    expected = {
        "probability": [p[0, 1], 1 / 3],
        "margin": [p[0, 2] - p[0, 1], 0.0],
        "negative_entropy": [(p[0] * p[0].log()).sum(), -math.log(3)],
    }
    for name, values in expected.items():
        torch.testing.assert_close(CONFIDENCES[name](scores, picked, noise()), torch.tensor([values]))
    assert set(CONFIDENCES) == {*expected, "random"}


def test_alg_temp_draws_the_order_from_the_softmax_of_the_confidences() -> None:
    """One token a step, of three: how often each is the first."""
    logits = torch.tensor([[0.0, 3.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.2, 0.0], [0.0, 0.0, 0.0]]).roll(1, 0)
    decoding = dream_decoding(gen_length=3, steps=3, algorithm="maskgit_plus", alg_temp=0.4)
    first = torch.zeros(3)
    for seed in range(500):
        step = next(
            step
            for step in decoding.stream(Scripted(logits), [[0]], mask_id=2, pad_id=0, seeds=[seed])
            if (step.canvas != 2).any()
        )
        first += (step.canvas[0] != 2) / 500
    expected = (logits[1:].softmax(-1)[:, 1] / 0.4).softmax(0)
    assert (first - expected).abs().max() < 4 * (0.25 / 500) ** 0.5


def test_origin_commits_by_chance() -> None:
    """A share of 1 - s / t of the masked tokens in the mean, with the spread of independent draws."""
    decoding = dream_decoding(gen_length=NUM, steps=4)
    counts = []
    for seed in range(30):
        step = next(decoding.stream(Scripted(LOGITS.expand(NUM + 1, 7)), [[0]], mask_id=MASK, pad_id=0, seeds=[seed]))
        counts.append(float((step.canvas != MASK).sum()))
    share = 1 - torch.linspace(1, 1e-3, 5)[1].item()
    sigma = (NUM * share * (1 - share)) ** 0.5
    assert abs(sum(counts) / 30 - NUM * share) < 4 * sigma / 30**0.5
    assert 0.5 * sigma < torch.tensor(counts).std() < 1.6 * sigma


@pytest.mark.parametrize("schedule", [EvenSpread(4), EvenSpread(9), NoiseLevels(4), NoiseLevels(9, 0.1)], ids=str)
def test_schedules_leave_nothing_over(schedule: EvenSpread | NoiseLevels) -> None:
    left = [0, 1, 2, 7, 30]
    for step in range(schedule.steps):
        counts = schedule.plan(left, step, [])
        assert all(0 <= count <= num_left for count, num_left in zip(counts, left, strict=True))
        left = [num_left - count for count, num_left in zip(counts, left, strict=True)]
    assert left == [0] * 5


def test_speed_ups() -> None:
    ordered = torch.tensor([[0.99, 0.95, 0.9, 0.3, -torch.inf], [0.5, 0.4, -torch.inf, -torch.inf, -torch.inf]])
    assert Threshold(0.9).may_commit(ordered).sum(1).tolist() == [3, 0]
    # (n + 1)(1 - c): 0.02, 0.15, 0.4, 3.5 and 1.0, 1.8
    assert Factor(0.41).may_commit(ordered).sum(1).tolist() == [3, 0]
    assert Factor(1.01).may_commit(ordered).sum(1).tolist() == [3, 1]
    assert Factor(100.0).may_commit(ordered).sum(1).tolist() == [4, 2]
