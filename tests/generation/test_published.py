"""Token for token what the published samplers generate (fixtures in tests/assets), alone and in batches."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dllm_jepa.generation import Decoding, dream_decoding, llada_decoding
from dllm_jepa.models import MaskedDiffusionLM, load_hf

ASSETS = Path(__file__).parents[1] / "assets"
MASKS = {"llada": 316, "dream": 317}


def cases(family: str, sampler: str) -> list[dict[str, Any]]:
    every = json.loads((ASSETS / f"{family}_tiny/generation.json").read_text())["cases"]
    return [case for case in every if case["sampler"].startswith(sampler)]


LLADA = cases("llada", "LLaDA/generate.py")
RIGHT_PADDED = cases("llada", "dllm MDLMSampler")
DREAM = cases("dream", "Dream diffusion_generate")


@pytest.fixture(scope="module")
def models() -> dict[str, MaskedDiffusionLM]:
    return {family: load_hf(ASSETS / f"{family}_tiny") for family in MASKS}


def real_tokens(case: dict[str, Any]) -> list[list[int]]:
    """The prompts without their padding."""
    if case["attention_mask"] is None:
        return case["prompt"]
    pairs = zip(case["prompt"], case["attention_mask"], strict=True)
    return [[token for token, is_real in zip(row, mask, strict=True) if is_real] for row, mask in pairs]


def check(model: MaskedDiffusionLM, decoding: Decoding, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """Together, and one by one."""
    call = {"mask_id": MASKS[model.family.lower()], "pad_id": 300}
    assert decoding.generate(model, prompts, **call).canvas.tolist() == expected
    if len(prompts) > 1:
        assert [decoding.generate(model, [prompt], **call).canvas[0].tolist() for prompt in prompts] == expected


def test_the_fixtures_hold_all_kinds_of_cases() -> None:
    assert (len(LLADA), len(RIGHT_PADDED), len(DREAM)) == (18, 3, 24)
    assert sum(len(case["prompt"]) > 1 for case in LLADA) == 8 and sum(case["cfg_scale"] > 0 for case in LLADA) == 2
    assert sum(len(case["prompt"]) > 1 for case in DREAM) == 12
    assert {case["alg"] for case in DREAM} == {"entropy", "maskgit_plus", "topk_margin"}


@pytest.mark.parametrize("case", LLADA, ids=lambda case: f"{len(case['prompt'])}x{case['gen_length']}")
def test_llada(models: dict[str, MaskedDiffusionLM], case: dict[str, Any]) -> None:
    # The published batches pad on the left and count positions from there, ours pad on the right. They agree, because
    # pads are hidden from attention and rotary positions enter it as distances only.
    options = {name: case[name] for name in ("gen_length", "block_length", "steps", "cfg_scale", "remasking")}
    expected = [row[-case["gen_length"] :] for row in case["output"]]
    check(models["llada"], llada_decoding(**options), real_tokens(case), expected)


class RoundedSpread:
    """The expected number at equal steps, rounded half to even, which leaves a remainder to the later steps."""

    is_random: ClassVar[bool] = False

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def plan(self, left: list[int], step: int, generators: Any) -> list[int]:
        return [round(num_left / (self.steps - step)) for num_left in left]


@pytest.mark.parametrize("case", RIGHT_PADDED, ids=lambda case: f"blocks of {case['block_size']}")
def test_a_right_padded_sampler(models: dict[str, MaskedDiffusionLM], case: dict[str, Any]) -> None:
    length = case["max_new_tokens"]
    decoding = llada_decoding(gen_length=length, block_length=case["block_size"], steps=case["steps"])
    if length % case["steps"]:
        # This sampler spreads a remainder otherwise: the only rule that has to be put in.
        decoding = replace(decoding, schedule=RoundedSpread(decoding.schedule.steps))
    expected = [row[len(p) : len(p) + length] for p, row in zip(case["inputs"], case["output"], strict=True)]
    check(models["llada"], decoding, case["inputs"], expected)


@pytest.mark.parametrize("case", DREAM, ids=lambda case: f"{len(case['prompt'])}x{case['alg']}-{case['steps']}")
def test_dream(models: dict[str, MaskedDiffusionLM], case: dict[str, Any]) -> None:
    length = case["max_new_tokens"]
    decoding = dream_decoding(gen_length=length, steps=case["steps"], algorithm=case["alg"], eps=case["eps"])
    check(models["dream"], decoding, real_tokens(case), [row[-length:] for row in case["output"]])
