"""The invariants of a canvas: order, batches, random numbers, early stop, streams."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_jepa.generation import Decoding, Generation, dream_decoding, llada_decoding
from dllm_jepa.models import MaskedDiffusionLM, load_hf
from tests.generation.scripted import Scripted, scripted

ASSETS = Path(__file__).parents[1] / "assets"
MASK, PAD = 316, 300
PROMPTS = [[5, 9, 17], [118, 52, 154, 176, 18, 26, 36], [29], [264, 198, 67, 4, 4]]


@pytest.fixture(scope="module", params=["llada", "dream"])
def model(request: pytest.FixtureRequest) -> MaskedDiffusionLM:
    return load_hf(ASSETS / f"{request.param}_tiny").double().eval()


def decode(model: Any, decoding: Decoding, prompts: list[list[int]], **options: Any) -> Generation:
    return decoding.generate(model, prompts, **({"mask_id": MASK, "pad_id": PAD} | options))


def test_surest_tokens_first_in_blocks_and_remainder_first() -> None:
    model = scripted(12)
    decoding = llada_decoding(gen_length=10, block_length=5, steps=6)
    result = decode(model, decoding, [[1, 2]], trace=True)  # the canvas is columns 2 to 11
    assert [int((canvas == MASK).sum()) for canvas in result.trace] == [8, 6, 5, 3, 1, 0]  # 2 + 2 + 1 twice
    allowed = model.table.index_fill(1, torch.tensor([MASK]), -torch.inf)
    sure = allowed.max(-1).values.exp() / model.table.exp().sum(-1)
    for start, traces in ((2, result.trace[:3]), (7, result.trace[3:])):
        order = sure[start : start + 5].argsort(descending=True) + start
        for canvas, committed in zip(traces, (2, 4, 5), strict=True):
            shown = torch.full((12,), MASK)
            shown[order[:committed]] = allowed.argmax(-1)[order[:committed]]
            assert torch.equal(canvas[0, start - 2 : start + 3], shown[start : start + 5])


def test_committed_tokens_stay_and_prompts_are_never_changed() -> None:
    model = scripted()
    trace = decode(model, llada_decoding(gen_length=10, block_length=5, steps=10), [[MASK, 2], [4]], trace=True).trace
    for before, after in zip(trace, trace[1:], strict=False):
        kept = before != MASK
        assert torch.equal(before[kept], after[kept]) and int((after != MASK).sum()) > int(kept.sum())
    assert all(seen[0, :2].tolist() == [MASK, 2] and seen[1, 0] == 4 for seen in model.seen)


def test_only_masked_tokens_of_the_block_are_scored() -> None:
    model = scripted()
    decode(model, llada_decoding(gen_length=10, block_length=5, steps=4), [[1], [3, 4]])
    for asked, seen in zip(model.asked, model.seen, strict=True):
        assert torch.equal(seen.flatten()[asked], torch.full_like(asked, MASK))
    assert [len(asked) for asked in model.asked] == [10, 4, 10, 4]
    # Behind prompts of one and two tokens, in rows of 12.
    assert set(model.asked[0].tolist()) == {*range(1, 6), *range(14, 19)}
    assert set(model.asked[2].tolist()) == {*range(6, 11), *range(19, 24)}


def test_steps_that_commit_nothing_cost_no_pass() -> None:
    for decoding in (
        llada_decoding(gen_length=10, block_length=5, steps=40),
        dream_decoding(gen_length=10, steps=400, algorithm="entropy"),
    ):
        model = scripted()
        generation = decode(model, decoding, [[1, 2], [3, 4]])
        assert len(model.asked) <= 10 and generation.num_passes == [len(model.asked)] * 2


RANDOM = {
    "gumbel": llada_decoding(gen_length=12, block_length=6, steps=6, temperature=1.0),
    "cut": llada_decoding(gen_length=12, block_length=6, steps=6, temperature=2.0, top_p=0.9, top_k=40),
    "random": llada_decoding(gen_length=12, block_length=4, steps=6, remasking="random"),
    "threshold": llada_decoding(gen_length=12, block_length=6, steps=12, temperature=0.5, threshold=0.3),
    "origin": dream_decoding(gen_length=12, steps=9),
    "origin, cached": dream_decoding(gen_length=12, steps=16, block_length=6, cache="prefix", cache_refresh=3),
    "alg_temp": dream_decoding(gen_length=12, steps=6, algorithm="entropy", temperature=0.4, top_p=0.9, alg_temp=0.5),
}
GREEDY = {
    "llada": llada_decoding(gen_length=12, block_length=5, steps=6),
    "guided": llada_decoding(gen_length=12, block_length=6, steps=6, cfg_scale=1.0),
    "dream": dream_decoding(gen_length=12, steps=7, algorithm="topk_margin"),
    "threshold": llada_decoding(gen_length=12, block_length=6, steps=12, threshold=0.25),
    "dual": llada_decoding(gen_length=12, block_length=4, steps=12, cache="dual", cache_refresh=2, factor=3.0),
}


def test_rows_that_wait_for_others_stay_visible(model: MaskedDiffusionLM) -> None:
    """Each row alone goes through the same canvases, and through no other ones."""
    trace = decode(model, GREEDY["threshold"], PROMPTS, trace=True).trace
    for row, prompt in enumerate(PROMPTS):
        seen = [trace[0][row].tolist()]
        seen += [
            after[row].tolist() for before, after in zip(trace, trace[1:], strict=False) if (before != after)[row].any()
        ]
        alone = decode(model, GREEDY["threshold"], [prompt], trace=True).trace
        assert seen == [canvas[0].tolist() for canvas in alone]
        assert len(seen) < len(trace) or row > 0  # the first row has waited


@pytest.mark.parametrize("decoding", [*RANDOM.values(), *GREEDY.values()], ids=[*RANDOM, *GREEDY])
def test_a_row_does_not_depend_on_its_batch(model: MaskedDiffusionLM, decoding: Decoding) -> None:
    """Tokens, passes and random numbers; a row that stops leaves the others."""
    seeds = [3, 1, 4, 1]
    stop = int(decode(model, decoding, PROMPTS, seeds=seeds).canvas[0, 2])
    together = decode(model, decoding, PROMPTS, seeds=seeds, stop_ids=[stop])
    for row, (prompt, seed) in enumerate(zip(PROMPTS, seeds, strict=True)):
        alone = decode(model, decoding, [prompt], seeds=[seed], stop_ids=[stop])
        assert torch.equal(alone.canvas[0], together.canvas[row])
        assert (alone.num_tokens, alone.num_passes) == ([together.num_tokens[row]], [together.num_passes[row]])


@pytest.mark.parametrize("model", ["llada"], indirect=True)
@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_come_from_the_seeds_alone(model: MaskedDiffusionLM, name: str) -> None:
    state = torch.get_rng_state()
    results = []
    for seeds in ([1, 2, 3], [1, 2, 3], [4, 4, 5]):
        trace = decode(model, RANDOM[name], [PROMPTS[0]] * 3, seeds=seeds, trace=True).trace
        results.append([[canvas[row].tolist() for canvas in trace] for row in range(3)])
    assert results[0] == results[1] and torch.equal(state, torch.get_rng_state())
    assert results[2][0] == results[2][1] and results[2][0] != results[2][2]
    assert results[0][0] != results[0][1] != results[0][2]


@pytest.mark.parametrize("model", ["llada"], indirect=True)
@pytest.mark.parametrize("decoding", [*RANDOM.values(), *GREEDY.values()], ids=[*RANDOM, *GREEDY])
def test_only_ids_with_a_token_are_sampled(model: MaskedDiffusionLM, decoding: Decoding) -> None:
    with torch.no_grad():
        weight = model.head.weight.clone()
        model.head.weight[[7, MASK]] *= 50.0  # by far the likeliest ids, or the unlikeliest
        seeds = range(4)
        allowed = {2, 3, 5, MASK}
        canvas = decode(model, decoding, PROMPTS, seeds=seeds, token_ids=[2, 3, 5, MASK]).canvas
        assert set(canvas.flatten().tolist()) <= allowed - {MASK}
        assert MASK not in decode(model, decoding, PROMPTS, seeds=seeds).canvas
        model.head.weight.copy_(weight)


def test_early_stop_keeps_all_up_to_the_first_stop(model: MaskedDiffusionLM) -> None:
    decoding = llada_decoding(gen_length=12, block_length=3, steps=12)
    whole = decode(model, decoding, PROMPTS)
    assert whole.num_tokens == [12] * 4 and whole.num_passes == [12] * 4
    for column in range(0, 12, 3):
        stops = whole.canvas[:2, column].tolist()
        stopped = decode(model, decoding, PROMPTS, stop_ids=stops, trace=True)
        for row, tokens in enumerate(whole.canvas.tolist()):
            end = next((place for place, token in enumerate(tokens) if token in stops), 12)
            assert stopped.canvas[row].tolist() == tokens[: end + 1] + [PAD] * (11 - end)
            assert stopped.num_tokens[row] == end
            assert stopped.num_passes[row] == min(12, 3 * (end // 3 + 1))
        assert torch.equal(stopped.trace[-1], stopped.canvas)


def test_finished_rows_leave_the_batch() -> None:
    model = Scripted(torch.full((16, 320), -5.0))
    for column, token in enumerate([1, 1, 9, 1, 1, 1, 1, 9], start=2):  # behind a prompt of two the stop comes third
        model.table[column, token] = 5.0
    decoding = llada_decoding(gen_length=8, block_length=2, steps=8)
    generation = decode(model, decoding, [[1, 2], [1] * 8, [1, 2]], stop_ids=[9])
    # The second row stops in its first block, and with it the longest row leaves.
    assert generation.num_tokens == [2, 1, 2] and generation.num_passes == [4, 2, 4]
    assert [tuple(seen.shape) for seen in model.seen] == [(3, 16)] * 2 + [(2, 10)] * 2


def test_a_stream_is_what_generate_reads(model: MaskedDiffusionLM) -> None:
    decoding = llada_decoding(gen_length=12, block_length=4, steps=6)
    call = {"mask_id": MASK, "pad_id": PAD, "stop_ids": [7]}
    generation = decoding.generate(model, PROMPTS, **call, trace=True)
    steps = []
    for step in decoding.stream(model, PROMPTS, **call):
        assert torch.is_grad_enabled()  # of whoever reads the stream
        steps.append(step)
    assert len(steps) == len(generation.trace) == 6
    assert all(torch.equal(step.canvas, canvas) for step, canvas in zip(steps, generation.trace, strict=True))
    assert torch.equal(steps[-1].canvas, generation.canvas) and steps[-1].num_passes == generation.num_passes
    assert [step.num_passes[0] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert decoding.generate(model, PROMPTS, **call).trace == []


def test_bad_calls() -> None:
    greedy = GREEDY["llada"]
    for decoding, options, message in [
        (greedy, {"prompts": []}, "at least one prompt, and a token in each"),
        (greedy, {"prompts": [[1], []]}, "at least one prompt, and a token in each"),
        (greedy, {"token_ids": [MASK]}, "token_ids must hold an id besides that of the mask"),
        (greedy, {"stop_ids": [3, MASK]}, r"stop_ids must not hold the id of the mask \(316\)"),
        (greedy, {"seeds": [1, 2]}, r"seeds must be one per prompt \(1\), got 2"),
        *((decoding, {}, "seeds must be given") for decoding in RANDOM.values()),
    ]:
        call = {"prompts": [[1]], "mask_id": MASK, "pad_id": PAD} | options
        for method in (decoding.generate, decoding.stream):
            with pytest.raises(ValueError, match=message):
                method(scripted(), **call)
