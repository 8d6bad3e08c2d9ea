"""The block sampler: against the published samplers' tokens, and the invariants of a canvas."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_jepa.generation import BlockDecoding, Generation
from dllm_jepa.models import MaskedDiffusionLM, load_hf

ASSETS = Path(__file__).parents[1] / "assets"
MASK, PAD = 316, 300


def llada_cases(sampler: str) -> list[dict[str, Any]]:
    """Cases without classifier-free guidance, each for a batch of one or more prompts."""
    cases = json.loads((ASSETS / "llada_tiny/generation.json").read_text())["cases"]
    return [case for case in cases if case["sampler"].startswith(sampler) and not case.get("cfg_scale")]


PUBLISHED = llada_cases("LLaDA/generate.py")
# This sampler gives the remainder to the last steps of a block: only blocks that split evenly can be compared.
RIGHT_PADDED = [case for case in llada_cases("dllm MDLMSampler") if case["max_new_tokens"] % case["steps"] == 0]


@pytest.fixture(scope="module")
def llada() -> MaskedDiffusionLM:
    return load_hf(ASSETS / "llada_tiny").eval()


@pytest.fixture(scope="module")
def dream() -> MaskedDiffusionLM:
    return load_hf(ASSETS / "dream_tiny").eval()


def decode(model, prompts, *, trace=False, generator=None, token_ids=None, **options) -> Generation:
    call = {"mask_id": MASK, "pad_id": PAD, "trace": trace, "generator": generator, "token_ids": token_ids}
    return BlockDecoding(**options).generate(model, prompts, **call)


def lengths(case: dict[str, Any]) -> dict[str, int]:
    return {name: case[name] for name in ("gen_length", "block_length", "steps")}


def real_tokens(rows: list[list[int]], attention_mask: list[list[int]] | None) -> list[list[int]]:
    """Rows without their padding."""
    if attention_mask is None:
        return rows
    pairs = zip(rows, attention_mask, strict=True)
    return [[token for token, is_real in zip(row, mask, strict=True) if is_real] for row, mask in pairs]


def test_the_fixture_holds_both_kinds_of_cases() -> None:
    assert len(PUBLISHED) == 16 and len(RIGHT_PADDED) == 2
    assert sum(len(case["prompt"]) > 1 for case in PUBLISHED) == 8


@pytest.mark.parametrize("score_whole_rows", [False, True], ids=["masked", "whole_rows"])
@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"{len(case['prompt'])}x{case['gen_length']}")
def test_same_tokens_as_llada(llada: MaskedDiffusionLM, case: dict[str, Any], score_whole_rows: bool) -> None:
    # The published batches pad on the left, ours on the right: with rotary positions only distances matter.
    prompts = real_tokens(case["prompt"], case["attention_mask"])
    canvas = decode(llada, prompts, **lengths(case), score_whole_rows=score_whole_rows).canvas
    assert canvas.tolist() == [row[-case["gen_length"] :] for row in case["output"]]


@pytest.mark.parametrize("case", RIGHT_PADDED, ids=lambda case: f"blocks of {case['block_size']}")
def test_same_tokens_as_a_right_padded_sampler(llada: MaskedDiffusionLM, case: dict[str, Any]) -> None:
    length = case["max_new_tokens"]
    canvas = decode(
        llada, case["inputs"], gen_length=length, block_length=case["block_size"], steps=case["steps"]
    ).canvas
    starts = map(len, case["inputs"])
    assert canvas.tolist() == [row[start : start + length] for row, start in zip(case["output"], starts, strict=True)]


PROMPTS = [[5, 9, 17], [118, 52, 154, 176, 18, 26, 36], [29], [264, 198, 67, 4, 4]]
LENGTHS = {"gen_length": 12, "block_length": 6, "steps": 8}


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("score_whole_rows", [False, True], ids=["masked", "whole_rows"])
def test_a_row_does_not_depend_on_its_batch(request, family: str, score_whole_rows: bool) -> None:
    model = request.getfixturevalue(family)
    together = decode(model, PROMPTS, **LENGTHS, score_whole_rows=score_whole_rows).canvas
    alone = [decode(model, [prompt], **LENGTHS).canvas for prompt in PROMPTS]
    assert torch.equal(together, torch.cat(alone))


class Scripted:
    """Scores every position by a fixed table [B, T, V], whatever the tokens; notes what it is asked for."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits
        self.asked: list[Tensor] = []
        self.seen: list[Tensor] = []

    def __call__(self, tokens, *, attention_mask=None, logits_at=None) -> tuple[Tensor, Tensor]:
        self.asked.append(logits_at.clone())
        self.seen.append(tokens.clone())
        return tokens, self.logits.flatten(0, 1)[logits_at]


def scripted(rows: int = 2, tokens: int = 12, vocab: int = 320) -> Scripted:
    return Scripted(torch.randn(rows, tokens, vocab, generator=torch.Generator().manual_seed(0)))


def test_surest_tokens_first_in_blocks_and_remainder_first() -> None:
    prompts = [[1, 2], [3, 4]]  # canvas: columns 2 to 11, blocks of 5
    model = scripted()
    result = decode(model, prompts, gen_length=10, block_length=5, steps=6, trace=True)
    probability, best = model.logits.index_fill(2, torch.tensor([MASK]), -torch.inf).max(-1)
    probability = probability.exp() / model.logits.exp().sum(-1)
    assert [int((canvas[0] == MASK).sum()) for canvas in result.trace] == [8, 6, 5, 3, 1, 0]  # 2 + 2 + 1 twice
    for row in range(2):
        for start, traces in ((2, result.trace[:3]), (7, result.trace[3:])):
            order = probability[row, start : start + 5].argsort(descending=True) + start
            for canvas, committed in zip(traces, (2, 4, 5), strict=True):
                shown = torch.full((5,), MASK)
                shown[order[:committed] - start] = best[row, order[:committed]]
                assert canvas[row, start - 2 : start + 3].tolist() == shown.tolist()
    assert torch.equal(result.trace[-1], result.canvas)


def test_committed_tokens_stay() -> None:
    trace = decode(scripted(), [[1, 2], [3, 4]], gen_length=10, block_length=5, steps=10, trace=True).trace
    for before, after in zip(trace, trace[1:], strict=False):
        kept = before != MASK
        assert torch.equal(before[kept], after[kept]) and int((after != MASK).sum()) > int(kept.sum())


def test_only_masked_tokens_of_the_block_are_scored() -> None:
    model = scripted()
    decode(model, [[1], [3, 4]], gen_length=10, block_length=5, steps=4)
    for asked, seen in zip(model.asked, model.seen, strict=True):
        assert torch.equal(seen.flatten()[asked], torch.full_like(asked, MASK))
    assert [len(asked) for asked in model.asked] == [10, 4, 10, 4]
    # Behind prompts of one and two tokens, in rows of 12.
    assert set(model.asked[0].tolist()) == {*range(1, 6), *range(14, 19)}
    assert set(model.asked[2].tolist()) == {*range(6, 11), *range(19, 24)}


def test_more_steps_than_tokens_call_the_model_once_a_token() -> None:
    model = scripted()
    decode(model, [[1, 2], [3, 4]], gen_length=10, block_length=5, steps=40)
    assert len(model.asked) == 10


def test_only_ids_with_a_token_are_sampled() -> None:
    model = scripted()
    model.logits[..., 7] += 100.0  # the likeliest everywhere, but not allowed
    model.logits[..., MASK] += 200.0
    options = {"gen_length": 10, "block_length": 10, "steps": 5}
    assert set(decode(model, [[1, 2], [3, 4]], **options).canvas.flatten().tolist()) == {7}
    for temperature in (0.0, 5.0):
        generator = torch.Generator().manual_seed(0)
        canvas = decode(
            model,
            [[1, 2], [3, 4]],
            **options,
            temperature=temperature,
            generator=generator,
            token_ids=[2, 3, 5, MASK],
        ).canvas
        assert set(canvas.flatten().tolist()) == {2, 3, 5}


def test_temperature_samples_from_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.0])  # id 4 is the mask
    model = Scripted(logits.expand(1, 4001, 5))
    decoding = BlockDecoding(gen_length=4000, block_length=4000, steps=1, temperature=2.0)
    canvas = decoding.generate(model, [[0]], mask_id=4, pad_id=0, generator=torch.Generator().manual_seed(0)).canvas
    expected = (logits[:4] / 2.0).softmax(0)
    shares = torch.bincount(canvas.flatten(), minlength=4)[:4] / 4000
    assert (shares - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_random_numbers_come_from_the_generator_alone() -> None:
    def sample(seed: int, **options) -> Tensor:
        torch.manual_seed(seed + 1)
        generator = torch.Generator().manual_seed(seed)
        options |= {"gen_length": 10, "block_length": 5, "steps": 10, "trace": True}
        return torch.stack(decode(scripted(), [[1], [3, 4]], generator=generator, **options).trace)

    for options in ({"temperature": 1.0}, {"remasking": "random"}):
        state = torch.get_rng_state()
        first = sample(0, **options)
        torch.set_rng_state(state)
        assert torch.equal(first, sample(0, **options))
        assert not torch.equal(first, sample(1, **options))
    # Random remasking changes the order alone: each token is still the likeliest one.
    assert torch.equal(sample(0, remasking="random")[-1], sample(1, remasking="random")[-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_length": 0}, "block_length must be between 1 and gen_length"),
        ({"block_length": 13}, "block_length must be between 1 and gen_length"),
        ({"steps": 3}, r"a multiple of the number of blocks \(2\), got 3"),
        ({"steps": 0}, "steps must be"),
        ({"temperature": -1.0}, "temperature must not be negative"),
        ({"remasking": "high"}, "remasking must be one of low_confidence, random, got 'high'"),
        ({"temperature": 1.0}, "a generator is needed"),
        ({"remasking": "random"}, "a generator is needed"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(scripted(), [[1], [3, 4]], **LENGTHS | change)


@pytest.mark.parametrize("prompts", [[], [[1], []]])
def test_a_prompt_without_tokens(prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="at least one prompt, and a token in each"):
        decode(scripted(), prompts, **LENGTHS)
