"""The bound on the likelihood, against all orders in which a response can be filled in."""

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from dllm_jepa.evals import _masked_rows
from dllm_jepa.evals._masked_rows import MaskedRow, candidate_log_probs, draw_masked
from dllm_jepa.evals.likelihood import conditional_log_likelihood
from dllm_jepa.models import MaskedDiffusionLM, load_hf
from dllm_jepa.models.dream import dream
from dllm_jepa.models.llada import llada
from tests.evals.toy_models import RecordingModel

ASSETS = Path(__file__).parents[1] / "assets"
MASKS = {"llada": 316, "dream": 317}
SIZES = {"vocab_size": 320, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "mlp_dim": 48}


@pytest.fixture(params=["llada", "dream"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> MaskedDiffusionLM:
    return load_hf(ASSETS / f"{family}_tiny")


def mean_over_orders(model: MaskedDiffusionLM, prompt: list[int], response: list[int], mask_id: int) -> float:
    """The same bound in another form: fill in the response one token at a time, in every order."""
    scores = {}
    for hidden in itertools.product([False, True], repeat=len(response)):
        tokens = [mask_id if hide else token for hide, token in zip(hidden, response, strict=True)]
        logits = model.token_logits(torch.tensor([prompt + tokens]))[0, len(prompt) :]
        scores[hidden] = logits.double().log_softmax(-1)[range(len(response)), response].tolist()
    total = 0.0
    for order in itertools.permutations(range(len(response))):
        hidden_now = [True] * len(response)
        for position in order:
            total += scores[tuple(hidden_now)][position]
            hidden_now[position] = False
    return total / math.factorial(len(response))


@torch.no_grad()
def test_short_responses_are_scored_without_noise(model: MaskedDiffusionLM, family: str) -> None:
    prompts, responses = [[5, 9, 2], [7], [1, 2], [5, 9, 2]], [[11, 3, 8, 8], [4], [6, 5], [12, 13, 14]]
    found = conditional_log_likelihood(model, prompts, responses, mask_id=MASKS[family], num_samples=15)
    expected = [mean_over_orders(model, p, r, MASKS[family]) for p, r in zip(prompts, responses, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["dream"])
def test_draws_are_unbiased(model: MaskedDiffusionLM, family: str) -> None:
    prompt, response, mask_id = [5, 9, 2], [11, 3, 8, 8, 20], MASKS[family]
    exact = mean_over_orders(model, prompt, response, mask_id)
    draws = torch.stack(
        [
            conditional_log_likelihood(model, [prompt], [response], mask_id=mask_id, num_samples=7, seed=seed)[0]
            for seed in range(60)
        ]
    )
    error = float(draws.std()) / math.sqrt(len(draws))
    assert error < 0.03 * abs(exact)
    assert abs(float(draws.mean()) - exact) < 4 * error


@pytest.mark.parametrize("family", ["llada"])
def test_results_depend_on_the_seed_and_not_on_the_batch(model: MaskedDiffusionLM, family: str) -> None:
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6], [7]]
    responses = [list(range(20, 32)), list(range(40, 49)), list(range(60, 75)), list(range(80, 89))]

    def estimate(chosen: list[int], batch_size: int, seed: int = 3) -> torch.Tensor:
        return conditional_log_likelihood(
            model,
            [prompts[i] for i in chosen],
            [responses[i] for i in chosen],
            mask_id=MASKS[family],
            num_samples=5,
            seed=seed,
            batch_size=batch_size,
        )

    together = estimate([0, 1, 2, 3], 7)
    torch.testing.assert_close(estimate([3, 1], 2), together[[3, 1]], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(torch.cat([estimate([i], 1) for i in range(4)]), together, rtol=1e-6, atol=1e-5)
    assert (estimate([0, 1, 2, 3], 7, seed=4) - together).abs().min() > 1e-3


@pytest.mark.parametrize("family", ["llada"])
def test_responses_to_one_prompt_share_their_masks(model: MaskedDiffusionLM, family: str) -> None:
    recorder = RecordingModel(model)
    responses = [list(range(20, 32)), list(range(50, 62))]
    conditional_log_likelihood(recorder, [[1, 2]] * 2, responses, mask_id=MASKS[family], num_samples=4, batch_size=4)
    (first, _), (second, _) = recorder.calls
    assert torch.equal(first == MASKS[family], second == MASKS[family])
    assert (first == MASKS[family]).any(0)[2:].all() and not (first == MASKS[family])[:, :2].any()


def test_strata_mask_the_right_number_of_tokens_and_any_of_them() -> None:
    num_strata, num_maskable = 4, 10
    sizes, positions = Counter(), Counter()
    for key in range(400):
        for stratum in range(num_strata):
            masked = draw_masked(str(key), stratum, num_strata, num_maskable)
            assert masked == sorted(set(masked)) and set(masked) <= set(range(num_maskable))
            # ceil(10 (k + u) / 4) for u in [0, 1)
            assert max(1, math.ceil(2.5 * stratum)) <= len(masked) <= math.ceil(2.5 * (stratum + 1))
            sizes[len(masked)] += 1
            positions.update(masked)
    # Each size is expected 160 times; each position in 5.5 of 10 tokens of 1,600 masks.
    assert set(sizes) == set(range(1, 11)) and all(115 <= count <= 205 for count in sizes.values())
    assert all(800 <= positions[position] <= 960 for position in range(num_maskable))


@pytest.mark.parametrize("family", ["llada"])
def test_forward_passes_are_bounded_in_rows_and_masked_tokens(
    model: MaskedDiffusionLM, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_masked_rows, "MAX_MASKED_TOKENS", 12)
    recorder = RecordingModel(model)
    tokens = list(range(20))
    rows = [MaskedRow(tokens[: 20 - at], range(size)) for at, size in enumerate([5, 5, 5, 15, 1, 1, 1, 1, 1])]
    found = candidate_log_probs(recorder, rows, mask_id=MASKS[family], batch_size=4)
    assert [len(positions) for _, positions in recorder.calls] == [10, 5, 15, 4, 1]
    monkeypatch.undo()
    expected = candidate_log_probs(model, rows, mask_id=MASKS[family], batch_size=1)
    assert [tuple(log_probs.shape) for log_probs in found] == [(len(row.masked), 1) for row in rows]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_candidates_have_the_scores_of_all_tokens(model: MaskedDiffusionLM, family: str, tied: bool) -> None:
    if tied:
        torch.manual_seed(0)
        model = {"llada": llada, "dream": dream}[family](**SIZES, tie_embeddings=True).eval()
    rows = [
        MaskedRow([4, 5, 6, 7, 8], [0, 1, 4], [[9, 2], [5, 5], [0, 319]]),
        MaskedRow([7, 3, 5], [0, 1], [[7, 8], [3, 2]]),
        MaskedRow([7, 3], [1], [[1, 0]]),
    ]
    found = candidate_log_probs(model, rows, mask_id=MASKS[family], batch_size=2)
    for row, log_probs in zip(rows, found, strict=True):
        tokens = [MASKS[family] if at in row.masked else token for at, token in enumerate(row.tokens)]
        scores = model.token_logits(torch.tensor([tokens]))[0].log_softmax(-1)
        expected = torch.stack([scores[at, ids] for at, ids in zip(row.masked, row.candidates, strict=True)])
        torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5)


def test_bounds_in_bf16_are_those_of_fp32(model: MaskedDiffusionLM, family: str) -> None:
    prompts, responses = [[5, 9, 2], [7]], [[11, 3, 8, 8], list(range(20, 32))]

    def bounds() -> torch.Tensor:
        return conditional_log_likelihood(model, prompts, responses, mask_id=MASKS[family], num_samples=15)

    exact = bounds()
    model.bfloat16()
    torch.testing.assert_close(bounds(), exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("family", ["llada"])
def test_bad_arguments(model: MaskedDiffusionLM) -> None:
    for prompts, responses, num_samples, message in [
        ([[1]], [[1], [2]], 4, "one response for each prompt, got 1 and 2"),
        ([[1], []], [[1], [2]], 4, "must have at least one token"),
        ([[1], [2]], [[1], []], 4, "must have at least one token"),
        ([[1]], [[1]], 0, "num_samples must be at least 1, got 0"),
        ([[1] * 4000], [[1] * 97], 4, "have 4097 tokens, the model's context is 4096"),
    ]:
        with pytest.raises(ValueError, match=message):
            conditional_log_likelihood(model, prompts, responses, mask_id=316, num_samples=num_samples)
