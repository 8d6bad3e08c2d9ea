"""The model contract: packed rows, chosen logits, the shift, tied heads, sizes."""

import pytest
import torch

from dllm_jepa.models import MaskedDiffusionLM
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
    with torch.device("meta"):
        models = {"llada": llada_8b(), "dream": dream_7b()}
    counts = {name: (sum(p.numel() for p in m.parameters()), len(list(m.parameters()))) for name, m in models.items()}
    assert counts == {"llada": (8_015_581_184, 291), "dream": (7_615_616_512, 339)}


def test_packed_equals_one_by_one(model: MaskedDiffusionLM) -> None:
    """Values and gradients; lengths of all buckets, one token included."""
    row = torch.randint(0, 50, (1, sum(LENGTHS)))
    positions = torch.arange(sum(LENGTHS))
    hidden, logits = model(row, attention_mask=PackedSequences.from_lengths(LENGTHS), logits_at=positions)
    logits.square().sum().backward()
    packed_gradients = [param.grad.clone() for param in model.parameters()]
    model.zero_grad()

    alone = [model(tokens, logits_at=torch.arange(tokens.size(1))) for tokens in row.split(LENGTHS, dim=1)]
    torch.testing.assert_close(hidden, torch.cat([h for h, _ in alone], dim=1))
    torch.testing.assert_close(logits, torch.cat([scores for _, scores in alone]))
    sum(scores.square().sum() for _, scores in alone).backward()
    for packed, param in zip(packed_gradients, model.parameters(), strict=True):
        torch.testing.assert_close(packed, param.grad)


def test_padded_equals_one_by_one(model: MaskedDiffusionLM) -> None:
    rows = torch.randint(0, 50, (len(LENGTHS), max(LENGTHS)))
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    hidden, _ = model(rows, attention_mask=real)
    for row, length, states in zip(rows, LENGTHS, hidden, strict=True):
        torch.testing.assert_close(states[:length], model(row[None, :length])[0][0])


def test_every_token_sees_the_whole_sequence(model: MaskedDiffusionLM) -> None:
    tokens = torch.randint(0, 49, (1, 10))
    changed = tokens.clone()
    changed[0, -1] = 49
    assert not torch.allclose(model(tokens)[0][0, 0], model(changed)[0][0, 0])


def test_chosen_logits_are_token_logits(model: MaskedDiffusionLM) -> None:
    tokens = torch.randint(0, 50, (3, 9))
    chosen = torch.tensor([0, 4, 9, 17, 26])
    every = model.token_logits(tokens)
    assert every.shape == (3, 9, 50)
    torch.testing.assert_close(model(tokens, logits_at=chosen)[1], every.flatten(0, 1)[chosen])
    hidden, logits = model(tokens, logits_at=chosen[:0])
    assert logits.shape == (0, 50)
    (logits.sum() + 0 * hidden.sum()).backward()


def test_shift_scores_token_from_the_state_before_it() -> None:
    torch.manual_seed(0)
    model = dream(**SIZES)
    tokens = torch.randint(0, 50, (2, 6))
    raw = model(tokens)[0] @ model.head.weight.T
    torch.testing.assert_close(model.token_logits(tokens), torch.cat((raw[:, :1], raw[:, :-1]), 1))
    packed = model(tokens.view(1, -1), attention_mask=PackedSequences.from_lengths([6, 6]), logits_at=torch.arange(12))
    torch.testing.assert_close(packed[1], model.token_logits(tokens).flatten(0, 1))


def test_tied_head_is_the_embedding() -> None:
    model = llada(**SIZES, tie_embeddings=True)
    assert "head.weight" not in model.state_dict()
    tokens = torch.randint(0, 50, (1, 5))
    torch.testing.assert_close(model.token_logits(tokens), model(tokens)[0] @ model.backbone.tok_embeddings.weight.T)


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
