"""Schedules, confidences, speed-ups and caches in batches of ragged prompts, against one prompt in plain loops."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_jepa.generation import Decoding, dream_decoding, llada_decoding
from dllm_jepa.models import LoRASettings, MaskedDiffusionLM, add_lora, load_hf
from tests.generation.plain_decoding import even, noise_levels, plain_decode

ASSETS = Path(__file__).parents[1] / "assets"
MASKS = {"llada": 316, "Dream": 317}
PROMPTS = [[5, 9, 17], [118, 52, 154, 176, 18, 26, 36], [29]]
GEN, BLOCK = 12, 5  # blocks of 5, 5 and 2


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request: pytest.FixtureRequest) -> MaskedDiffusionLM:
    return load_hf(ASSETS / f"{request.param}_tiny").double().eval()


def with_adapters() -> MaskedDiffusionLM:
    """LoRA on every projection, with weights that change all outputs."""
    model = load_hf(ASSETS / "llada_tiny")
    add_lora(model, LoRASettings(["q_proj", "k_proj", "v_proj", "output_proj"], True, 4, 8.0, 0.0, False))
    generator = torch.Generator().manual_seed(0)
    for param in model.parameters():
        if param.requires_grad:
            torch.nn.init.normal_(param, std=0.1, generator=generator)
    return model.double().eval()


def generate(model: MaskedDiffusionLM, decoding: Decoding) -> list[list[int]]:
    return decoding.generate(model, PROMPTS, mask_id=MASKS[model.family], pad_id=300).canvas.tolist()


def plain(model: MaskedDiffusionLM, *, block: int = BLOCK, **options: Any) -> list[list[int]]:
    mask = MASKS[model.family]
    return [plain_decode(model, prompt, mask, gen_length=GEN, block_length=block, **options) for prompt in PROMPTS]


@pytest.mark.parametrize("steps", [6, 24])
def test_even_spread(model: MaskedDiffusionLM, steps: int) -> None:
    decoding = llada_decoding(gen_length=GEN, block_length=BLOCK, steps=steps)
    assert generate(model, decoding) == plain(model, count=even(steps // 3))


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [("maskgit_plus", "probability"), ("topk_margin", "margin"), ("entropy", "negative_entropy")],
)
@pytest.mark.parametrize(("steps", "block"), [(7, None), (9, 4)])
def test_noise_levels(model: MaskedDiffusionLM, algorithm: str, kind: str, steps: int, block: int | None) -> None:
    decoding = dream_decoding(gen_length=GEN, steps=steps, algorithm=algorithm, block_length=block)
    per_block = steps // (GEN // block if block else 1)
    assert generate(model, decoding) == plain(model, block=block or GEN, count=noise_levels(per_block), kind=kind)


@pytest.mark.parametrize("speed_up", [{"threshold": 0.2}, {"factor": 2.2}], ids=str)
@pytest.mark.parametrize("algorithm", ["maskgit_plus", "topk_margin", None])
def test_speed_ups(model: MaskedDiffusionLM, algorithm: str | None, speed_up: dict[str, float]) -> None:
    """With as many steps as tokens nothing but the confidences decides; no step commits less than one token."""
    if algorithm is None:
        decoding = llada_decoding(gen_length=GEN, block_length=4, steps=GEN, **speed_up)
        expected = plain(model, block=4, count=lambda *_: 1, **speed_up)
    else:
        decoding = dream_decoding(gen_length=GEN, steps=GEN, algorithm=algorithm, **speed_up)
        kind = "margin" if algorithm == "topk_margin" else "probability"
        expected = plain(model, block=GEN, count=noise_levels(GEN), kind=kind, **speed_up)
    generation = decoding.generate(model, PROMPTS, mask_id=MASKS[model.family], pad_id=300)
    assert generation.canvas.tolist() == expected
    assert min(generation.num_passes) < GEN  # something was committed together


def test_a_model_that_is_never_sure_commits_what_is_planned(model: MaskedDiffusionLM) -> None:
    planned = llada_decoding(gen_length=GEN, block_length=BLOCK, steps=6)
    unsure = llada_decoding(gen_length=GEN, block_length=BLOCK, steps=6, threshold=1.0)
    assert generate(model, planned) == generate(model, unsure)


@pytest.mark.parametrize("speed_up", [{}, {"threshold": 0.2}], ids=["planned", "threshold"])
@pytest.mark.parametrize("refresh", [None, 2])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_caches(model: MaskedDiffusionLM, cache: str, refresh: int | None, speed_up: dict[str, float]) -> None:
    options = {"gen_length": GEN, "block_length": BLOCK, "steps": 15, **speed_up}
    result = generate(model, llada_decoding(**options, cache=cache, cache_refresh=refresh))
    assert result == plain(model, count=lambda *_: 1, cache=cache, refresh_every=refresh, **speed_up)
    assert speed_up or result != generate(model, llada_decoding(**options))  # what is not fed is stale


def test_a_cache_with_adapters() -> None:
    model = with_adapters()
    result = generate(model, llada_decoding(gen_length=GEN, block_length=BLOCK, steps=15, cache="dual"))
    assert result == plain(model, count=lambda *_: 1, cache="dual")
    assert result != generate(model, llada_decoding(gen_length=GEN, block_length=BLOCK, steps=15))
    exact = llada_decoding(gen_length=GEN, block_length=BLOCK, steps=15, cache="dual", cache_refresh=1)
    assert generate(model, exact) == plain(model, count=even(5))


@pytest.mark.parametrize(("cache", "speed_up"), [("prefix", {}), ("dual", {"threshold": 0.2})])
def test_a_refresh_at_every_step_is_exact(model: MaskedDiffusionLM, cache: str, speed_up: dict[str, float]) -> None:
    exact = {"gen_length": GEN, "block_length": 6, "steps": 12} | speed_up
    cached = exact | {"cache": cache, "cache_refresh": 1}
    assert generate(model, llada_decoding(**exact)) == generate(model, llada_decoding(**cached))
    exact, cached = ({**options, "algorithm": "maskgit_plus"} for options in (exact, cached))
    assert generate(model, dream_decoding(**exact)) == generate(model, dream_decoding(**cached))


@pytest.mark.parametrize(("cache", "fed"), [("prefix", [[12, 12], [8, 8], [4, 4]]), ("dual", [[4, 4], [4, 4], [4, 4]])])
def test_a_cache_feeds_fewer_tokens(model: MaskedDiffusionLM, cache: str, fed: list[list[int]]) -> None:
    sizes: list[int] = []
    handle = model.backbone.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].size(1)))
    decoding = llada_decoding(gen_length=12, block_length=4, steps=9, cache=cache)  # three passes a block
    decoding.generate(model, PROMPTS, mask_id=MASKS[model.family], pad_id=300)
    handle.remove()
    longest, before = max(map(len, PROMPTS)) + 12, int(model.shift_logits)
    assert sizes == [size for block in fed for size in (longest, *(number + before for number in block))]


def test_guidance(model: MaskedDiffusionLM) -> None:
    """One step, against logits with and without the prompt."""
    mask = MASKS[model.family]
    decoding = llada_decoding(gen_length=4, block_length=4, steps=1, cfg_scale=1.5)
    canvas = decoding.generate(model, PROMPTS, mask_id=MASKS[model.family], pad_id=300).canvas
    for prompt, generated in zip(PROMPTS, canvas, strict=True):
        with_prompt, without = (
            model.token_logits(torch.tensor([[*ids, *[mask] * 4]]))[0, -4:] for ids in (prompt, [mask] * len(prompt))
        )
        logits = without + 2.5 * (with_prompt - without)
        logits[:, mask] = -torch.inf
        assert torch.equal(generated, logits.argmax(-1))
