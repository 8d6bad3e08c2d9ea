"""The model contract: packed rows, chosen logits, the shift, tied heads, sizes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dllm_jepa.models import LoRASettings, MaskedDiffusionLM, add_lora
from dllm_jepa.models.dream import dream, dream_7b
from dllm_jepa.models.llada import llada, llada_8b
from dllm_jepa.packing import PackedSequences

SIZES = {"vocab_size": 50, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48}
LENGTHS = [7, 1, 12, 3, 8, 16, 2]


@pytest.fixture(params=[llada, dream], ids=["llada", "dream"])
def model(request: pytest.FixtureRequest) -> MaskedDiffusionLM:
    torch.manual_seed(0)
    return request.param(**SIZES, max_seq_len=16).double()


def test_published_sizes() -> None:
    for build, size, number in ((llada_8b, 8_015_581_184, 291), (dream_7b, 7_615_616_512, 339)):
        with torch.device("meta"):
            sizes = [param.numel() for param in build().parameters()]
        assert (sum(sizes), len(sizes)) == (size, number)


def test_hidden_states_of_some_tokens(model: MaskedDiffusionLM) -> None:
    """Equal to those of all tokens, and the last feed-forward is computed for no others."""
    tokens = torch.randint(0, 50, (1, sum(LENGTHS)))
    packing = PackedSequences.from_lengths(LENGTHS)
    every = model(tokens, attention_mask=packing)
    fed: list[tuple[int, ...]] = []
    for layer in model.backbone.layers:
        layer.mlp.register_forward_hook(lambda _, inputs, __: fed.append(tuple(inputs[0].shape)))
    for chosen in (torch.tensor([40, 3, 4, 0]), torch.tensor([], dtype=torch.int64)):
        fed.clear()
        hidden = model(tokens, attention_mask=packing, hidden_at=chosen)
        assert fed == [(1, sum(LENGTHS), 32), (1, len(chosen), 32)]
        torch.testing.assert_close(hidden, every[:, chosen])


def test_packed_equals_one_by_one(model: MaskedDiffusionLM) -> None:
    """Values and gradients; lengths of all buckets, one token included."""
    row = torch.randint(0, 50, (1, sum(LENGTHS)))
    positions = torch.arange(sum(LENGTHS))
    packing = PackedSequences.from_lengths(LENGTHS)
    hidden = model(row, attention_mask=packing)
    logits = model.logits(hidden, positions, attention_mask=packing)
    logits.square().sum().backward()
    packed_gradients = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()

    sequences = row.split(LENGTHS, dim=1)
    alone = [model.token_logits(tokens)[0] for tokens in sequences]
    torch.testing.assert_close(hidden, torch.cat([model(tokens) for tokens in sequences], dim=1))
    torch.testing.assert_close(logits, torch.cat(alone))
    sum(scores.square().sum() for scores in alone).backward()
    for packed, param in zip(packed_gradients, model.parameters(), strict=True):
        torch.testing.assert_close(packed, param.grad)


def test_padded_equals_one_by_one(model: MaskedDiffusionLM) -> None:
    rows = torch.randint(0, 50, (len(LENGTHS), max(LENGTHS)))
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    hidden = model(rows, attention_mask=real)
    for row, length, states in zip(rows, LENGTHS, hidden, strict=True):
        torch.testing.assert_close(states[:length], model(row[None, :length])[0])


def test_every_token_sees_the_whole_sequence(model: MaskedDiffusionLM) -> None:
    tokens = torch.randint(0, 49, (1, 10))
    changed = tokens.clone()
    changed[0, -1] = 49
    assert not torch.allclose(model(tokens)[0, 0], model(changed)[0, 0])


def test_chosen_logits_are_token_logits(model: MaskedDiffusionLM) -> None:
    tokens = torch.randint(0, 50, (3, 9))
    chosen = torch.tensor([0, 4, 9, 17, 26])
    every = model.token_logits(tokens)
    assert every.shape == (3, 9, 50)
    hidden = model(tokens)
    torch.testing.assert_close(model.logits(hidden, chosen), every.flatten(0, 1)[chosen])
    logits = model.logits(hidden, chosen[:0])
    assert logits.shape == (0, 50)
    (logits.sum() + 0 * hidden.sum()).backward()


def test_shift_scores_token_from_the_state_before_it() -> None:
    torch.manual_seed(0)
    model = dream(**SIZES)
    tokens = torch.randint(0, 50, (2, 6))
    raw = model(tokens) @ model.head.weight.T
    torch.testing.assert_close(model.token_logits(tokens), torch.cat((raw[:, :1], raw[:, :-1]), 1))
    packing = PackedSequences.from_lengths([6, 6])
    packed = model.logits(model(tokens.view(1, -1), attention_mask=packing), torch.arange(12), attention_mask=packing)
    torch.testing.assert_close(packed, model.token_logits(tokens).flatten(0, 1))


def test_tied_head_is_the_embedding() -> None:
    model = llada(**SIZES, tie_embeddings=True)
    assert "head.weight" not in model.state_dict()
    tokens = torch.randint(0, 50, (1, 5))
    torch.testing.assert_close(model.token_logits(tokens), model(tokens) @ model.backbone.tok_embeddings.weight.T)


def test_row_over_the_context_is_refused(model: MaskedDiffusionLM) -> None:
    with pytest.raises(ValueError, match="a row of 17 tokens is over the model's max_seq_len of 16"):
        model(torch.zeros(1, 17, dtype=torch.int64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, r"embed_dim \(32\) must be an even multiple of num_heads \(5\)"),
        ({"num_kv_heads": 3}, r"num_heads \(4\) must be a multiple of num_kv_heads \(3\)"),
        ({"mlp_dim": 0}, "mlp_dim must be at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llada(**(SIZES | change))


# Losses in chunks


def asked(n: int = 7) -> dict[str, Any]:
    """What a model [2, 6] is asked for: losses of `n` of 12 tokens."""
    generator = torch.Generator().manual_seed(n)
    return {
        "positions": torch.randperm(12, generator=generator)[:n],
        "labels": torch.randint(0, 50, (n,), generator=generator),
        "token_weights": torch.rand(n, generator=generator, dtype=torch.float64),
        "chunk_tokens": 3,
    }


@pytest.mark.parametrize(
    ("build", "tied", "adapters"),
    [(llada, False, True), (llada, True, False), (dream, False, False), (dream, True, True)],
)
def test_losses_are_those_of_the_logits(build: Any, tied: bool, adapters: bool) -> None:
    """With their gradients, the shift of Dream, and a frozen head beside adapters."""
    torch.manual_seed(0)
    model: MaskedDiffusionLM = build(**SIZES, tie_embeddings=tied)
    if adapters:
        add_lora(model, LoRASettings(["q_proj"], apply_to_mlp=False, rank=2, alpha=4.0))
    model.double()
    tokens, wanted = torch.randint(0, 50, (2, 6)), asked()
    hidden = model(tokens)
    losses = model.score(hidden, **wanted)
    (losses.weighted_sum + hidden.sum()).backward()
    gradients = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()

    hidden = model(tokens)
    logits = model.logits(hidden, wanted["positions"])
    per_token = F.cross_entropy(logits, wanted["labels"], reduction="none")
    weighted_sum = (wanted["token_weights"] * per_token).sum()
    (weighted_sum + hidden.sum()).backward()
    torch.testing.assert_close(losses.per_token, per_token.detach())
    torch.testing.assert_close(losses.weighted_sum, weighted_sum)
    for name, param in model.named_parameters():
        assert (param.grad is None) == (gradients[name] is None) == (adapters and "lora" not in name), name
        if param.grad is not None:
            torch.testing.assert_close(gradients[name], param.grad, msg=name)


@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
def test_without_tokens_every_gradient_is_there(tied: bool) -> None:
    model = llada(**SIZES, tie_embeddings=tied).double()
    losses = model.score(model(torch.randint(0, 50, (2, 6))), **asked(0))
    losses.weighted_sum.backward()
    assert losses.weighted_sum == 0
    assert all(param.grad is not None and not param.grad.any() for param in model.parameters())


def test_a_compiled_loss_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = llada(**SIZES | {"num_layers": 1}).double()
    tokens = torch.randint(0, 50, (2, 6))
    eager = model.score(model(tokens), **asked())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    model.compile_layers()
    compiled = model.score(model(tokens), **asked())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch.testing.assert_close(compiled.per_token, eager.per_token)
    torch.testing.assert_close(compiled.weighted_sum, eager.weighted_sum)


def test_units_are_in_the_order_of_use() -> None:
    own, tied = llada(**SIZES), llada(**SIZES, tie_embeddings=True)
    assert own.units == [*own.backbone.layers, own.head]
    assert tied.units == [*tied.backbone.layers]
