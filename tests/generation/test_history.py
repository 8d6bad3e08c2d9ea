"""When each token was filled in, also where finished rows were padded."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_jepa.generation import Decoding, llada_decoding
from dllm_jepa.generation.show import CanvasHistory

MASK, PAD, END, VOCAB = 0, 9, 8, 12


def follow(*canvases: list[list[int]]) -> CanvasHistory:
    history = CanvasHistory(len(canvases[0]), gen_length=6, block_length=2, mask_id=MASK)
    for canvas in canvases:
        history.add(torch.tensor(canvas))
    return history


def test_every_token_has_the_step_after_which_it_was_there() -> None:
    """A step without a new token counts."""
    steps = [[5, 0, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0], [5, 6, 0, 0, 0, 0], [5, 6, 0, 7, 0, 0]]
    history = follow(*([row] for row in steps))
    assert history.num_steps == 4
    assert history.tokens.tolist() == steps[-1:]
    assert history.filled_at.tolist() == [[1, 3, 0, 4, 0, 0]]


def test_padding_is_not_filled_in() -> None:
    before = [[5, 0, 0, 0, 0, 0], [END, 0, 0, 0, 0, 0]]
    after = [[5, 6, 0, 0, 0, 0], [END, PAD, PAD, PAD, PAD, PAD]]  # 7 was sampled behind the end, and padded over
    later = [[5, 6, 7, 0, 0, 0], [END, PAD, PAD, PAD, PAD, PAD]]
    history = follow(before, after, later)
    assert history.filled_at.tolist() == [[1, 2, 3, 0, 0, 0], [1, 2, 0, 0, 0, 0]]
    assert history.tokens.tolist() == [[5, 6, 7, 0, 0, 0], [END, PAD, 0, 0, 0, 0]]


@pytest.mark.parametrize("seed", range(2))
def test_of_a_decoding_it_has_what_came_out_up_to_the_end(seed: int) -> None:
    scores = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))
    scores[:, END] += 0.5

    class Model:
        def __call__(self, tokens: Tensor, **_: Any) -> Tensor:
            return tokens

        def logits(self, hidden: Tensor, positions: Tensor, **_: Any) -> Tensor:
            return scores[hidden.flatten().roll(1)][positions]

    model: Any = Model()
    decoding: Decoding = llada_decoding(gen_length=12, block_length=4, steps=6, temperature=1.0)
    call: Any = {"mask_id": MASK, "pad_id": PAD, "stop_ids": [END], "seeds": range(8)}
    prompts = [[token] for token in range(1, 8)] + [[2, 3]]
    generation = decoding.generate(model, prompts, **call)
    history = CanvasHistory(8, gen_length=12, block_length=4, mask_id=MASK)
    for step in decoding.stream(model, prompts, **call):
        history.add(step.canvas)
    assert len(set(generation.num_passes)) > 1  # a row is finished before another
    for row, num_tokens in enumerate(generation.num_tokens):
        filled = history.filled_at[row]
        assert history.tokens[row, : num_tokens + 1].tolist() == generation.canvas[row, : num_tokens + 1].tolist()
        assert bool((filled[: num_tokens + 1] > 0).all())
        assert filled.max() == generation.num_passes[row]
        per_step = filled[filled > 0].unique(return_counts=True)[1]
        assert per_step.tolist() == [2] * generation.num_passes[row]  # two tokens a step, padding not among them
