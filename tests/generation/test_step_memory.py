"""What a step holds: logits of all tokens as the model gave them, anything else of a bounded number of tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dllm_jepa.errors import CheckpointError
from dllm_jepa.generation import Decoding, dream_decoding, llada_decoding
from tests.generation.scripted import Scripted, scripted

MASK, PAD, VOCAB = 316, 300, 320
BOUND = 256  # tokens
LENGTH = 400  # a row is cut in two

DECODINGS = {
    "greedy": llada_decoding(gen_length=LENGTH, block_length=LENGTH, steps=2),
    "guided": llada_decoding(gen_length=LENGTH, block_length=LENGTH, steps=2, cfg_scale=0.5),
    "short": llada_decoding(gen_length=LENGTH, block_length=80, steps=10, temperature=0.5),  # several rows at a time
    "random": llada_decoding(gen_length=LENGTH, block_length=LENGTH, steps=2, temperature=1.0, remasking="random"),
    "origin": dream_decoding(gen_length=LENGTH, steps=3, temperature=0.2, top_p=0.95),
    "margin": dream_decoding(gen_length=LENGTH, steps=3, algorithm="topk_margin", temperature=0.7, top_k=9),
    "entropy": dream_decoding(
        gen_length=LENGTH, steps=3, algorithm="entropy", temperature=0.2, top_p=0.9, alg_temp=0.1
    ),
}


class Widest(TorchDispatchMode):
    """Notes the most tokens that an operation gave out numbers for the whole vocabulary of, bf16 aside."""

    tokens = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for given in tree_leaves(result):
            if isinstance(given, Tensor) and given.shape[-1:] == (VOCAB,) and given.dtype != torch.bfloat16:
                self.tokens = max(self.tokens, given.numel() // VOCAB)
        return result


def decode(model: Scripted, decoding: Decoding, seeds: list[int]) -> list[list[int]]:
    prompts = [[1, 2]] * len(seeds)
    canvas: list[list[int]] = decoding.generate(model, prompts, mask_id=MASK, pad_id=PAD, seeds=seeds).canvas.tolist()
    return canvas


@pytest.mark.parametrize("name", DECODINGS)
def test_a_bounded_number_of_tokens_is_in_full_precision(name: str) -> None:
    model = scripted(LENGTH + 2)
    model.table = model.table.bfloat16()
    with Widest() as widest:
        decode(model, DECODINGS[name], [1, 2, 3, 4])
    assert max(len(asked) for asked in model.asked) > BOUND
    assert 0 < widest.tokens <= BOUND


@pytest.mark.parametrize("name", DECODINGS)
def test_long_rows_do_not_depend_on_the_rows_beside_them(name: str) -> None:
    model = scripted(LENGTH + 2)
    together = decode(model, DECODINGS[name], [7, 8, 9])
    assert together == [decode(model, DECODINGS[name], [seed])[0] for seed in (7, 8, 9)]


def test_every_token_gets_its_own_pick_and_confidence() -> None:
    """Two steps of a canvas that is cut: the surer half first, each place with the likeliest token of its column."""
    model = scripted(LENGTH + 2)
    call = {"mask_id": MASK, "pad_id": PAD}
    first, last = DECODINGS["greedy"].generate(model, [[1, 2]] * 3, **call, trace=True).trace
    allowed = model.table[2:].index_fill(1, torch.tensor([MASK]), -torch.inf)
    sure = (allowed.amax(-1).double().exp() / model.table[2:].double().exp().sum(-1)).argsort(descending=True)
    expected = torch.full((LENGTH,), MASK)
    expected[sure[: LENGTH // 2]] = allowed.argmax(-1)[sure[: LENGTH // 2]]
    assert torch.equal(first, expected.expand(3, -1)) and torch.equal(last, allowed.argmax(-1).expand(3, -1))


@pytest.mark.parametrize("name", ["greedy", "guided", "entropy"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_end_the_generation(name: str, value: float) -> None:
    model = scripted(LENGTH + 2)
    model.table[300, 17] = value  # of one token, in the second part of a row
    with pytest.raises(CheckpointError, match="the model's logits are not finite numbers"):
        decode(model, DECODINGS[name], [1, 2])


def test_ids_that_the_model_rules_out_are_fine() -> None:
    model = scripted(LENGTH + 2)
    model.table[:, 17] = -torch.inf
    assert not any(17 in canvas for canvas in decode(model, DECODINGS["greedy"], [1, 2]))


def test_finite_logits_are_checked_once_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each look at a tensor holds up the host."""
    looks = []
    monkeypatch.setattr(Tensor, "__bool__", lambda tensor: looks.append(tensor) or bool(tensor.item()))
    decode(scripted(), llada_decoding(gen_length=12, block_length=4, steps=12), [1])
    assert len(looks) == 3
