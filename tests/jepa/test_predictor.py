"""Predictors, against a real decoder layer on a sequence of length one and against formulas written out."""

import pytest
import torch
from torch import Tensor, nn
from torchtune.modules import FeedForward, MultiHeadAttention, RMSNorm, TransformerSelfAttentionLayer

from dllm_jepa.jepa import Predictor, identity_predictor, mlp_predictor, transformer_predictor

EMBED_DIM, MLP_DIM = 8, 12


def randomize(module: nn.Module) -> None:
    """Fill every parameter, norm scales too, so that a scale that is not applied shows."""
    generator = torch.Generator().manual_seed(0)
    for param in module.parameters():
        nn.init.normal_(param, 0.5, 0.5, generator=generator)


@pytest.fixture
def pooled() -> Tensor:
    return torch.randn(6, EMBED_DIM, generator=torch.Generator().manual_seed(1))


def decoder_layer() -> TransformerSelfAttentionLayer:
    """torchtune's layer with two heads, and with the queries and keys that the predictor does without."""
    attention = MultiHeadAttention(
        embed_dim=EMBED_DIM,
        num_heads=2,
        num_kv_heads=2,
        head_dim=EMBED_DIM // 2,
        **{f"{name}_proj": nn.Linear(EMBED_DIM, EMBED_DIM, bias=False) for name in ("q", "k", "v", "output")},
        is_causal=False,
    )
    mlp = FeedForward(
        gate_proj=nn.Linear(EMBED_DIM, MLP_DIM, bias=False),
        down_proj=nn.Linear(MLP_DIM, EMBED_DIM, bias=False),
        up_proj=nn.Linear(EMBED_DIM, MLP_DIM, bias=False),
    )
    return TransformerSelfAttentionLayer(attention, mlp, sa_norm=RMSNorm(EMBED_DIM), mlp_norm=RMSNorm(EMBED_DIM))


@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_equals_decoder_layers_on_a_sequence_of_one(num_layers: int, pooled: Tensor) -> None:
    """Whatever queries and keys are; and these would get no gradient."""
    predictor = transformer_predictor(EMBED_DIM, MLP_DIM, num_layers=num_layers)
    randomize(predictor)
    full = nn.Sequential(*(decoder_layer() for _ in range(num_layers)), RMSNorm(EMBED_DIM))
    renamed = {name.removeprefix("layers."): weight for name, weight in predictor.state_dict().items()}
    renamed = {
        name.replace("v_proj", "attn.v_proj").replace("output_proj", "attn.output_proj"): weight
        for name, weight in renamed.items()
    }
    missing, unexpected = full.load_state_dict(renamed, strict=False)
    assert not unexpected and all(name.endswith(("q_proj.weight", "k_proj.weight")) for name in missing)
    assert len(missing) == 2 * num_layers

    expected = full(pooled[:, None, :]).squeeze(1)  # [S, 1, D] to [S, D]
    torch.testing.assert_close(predictor(pooled), expected)
    (expected * torch.randn(EMBED_DIM)).sum().backward()
    gradients = {name: param.grad for name, param in full.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    for name in missing:
        torch.testing.assert_close(gradients[name], torch.zeros(EMBED_DIM, EMBED_DIM), atol=1e-6, rtol=0)


def test_one_layer_by_hand(pooled: Tensor) -> None:
    predictor = transformer_predictor(EMBED_DIM, MLP_DIM)
    randomize(predictor)
    weights = {name: weight.double() for name, weight in predictor.state_dict().items()}

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return x / ((x * x).sum(-1, keepdim=True) / EMBED_DIM + 1e-6).sqrt() * scale

    x = pooled.double()
    value = norm(x, weights["layers.0.sa_norm.scale"]) @ weights["layers.0.v_proj.weight"].T
    x = x + value @ weights["layers.0.output_proj.weight"].T
    inner = norm(x, weights["layers.0.mlp_norm.scale"])
    gate = inner @ weights["layers.0.mlp.w1.weight"].T
    up = inner @ weights["layers.0.mlp.w3.weight"].T
    x = x + (gate / (1 + (-gate).exp()) * up) @ weights["layers.0.mlp.w2.weight"].T
    expected = norm(x, weights["layers.1.scale"])
    torch.testing.assert_close(predictor(pooled).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_layers", range(1, 6))
def test_every_weight_is_trained(num_layers: int, pooled: Tensor) -> None:
    predictor = transformer_predictor(EMBED_DIM, MLP_DIM, num_layers=num_layers)
    # A loss that the final norm cannot make constant.
    (predictor(pooled) * torch.randn(EMBED_DIM, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert all(param.grad is not None and param.grad.abs().max() > 0 for param in predictor.parameters())
    per_layer = 2 * EMBED_DIM**2 + 3 * EMBED_DIM * MLP_DIM + 2 * EMBED_DIM
    assert sum(param.numel() for param in predictor.parameters()) == num_layers * per_layer + EMBED_DIM


def test_size_beside_an_8b_backbone() -> None:
    with torch.device("meta"):
        predictor = transformer_predictor(4096, 12_288)
    assert round(sum(param.numel() for param in predictor.parameters()) / 1e9, 2) == 0.18


@pytest.mark.parametrize("num_layers", [-1, 0, 6])
def test_the_number_of_layers_is_checked(num_layers: int) -> None:
    with pytest.raises(ValueError, match=f"num_layers must be between 1 and 5, got {num_layers}"):
        transformer_predictor(EMBED_DIM, MLP_DIM, num_layers=num_layers)


@pytest.mark.parametrize(
    "predictor",
    [
        transformer_predictor(EMBED_DIM, MLP_DIM, num_layers=2),
        mlp_predictor(EMBED_DIM, MLP_DIM),
        identity_predictor(8, 12),
    ],
    ids=["transformer", "mlp", "identity"],
)
def test_sequences_do_not_see_each_other(predictor: Predictor, pooled: Tensor) -> None:
    together = predictor(pooled)
    assert together.shape == pooled.shape
    torch.testing.assert_close(together, torch.cat([predictor(row[None]) for row in pooled]))
    assert predictor(pooled[:0]).shape == (0, EMBED_DIM)


def test_mlp_by_hand(pooled: Tensor) -> None:
    predictor = mlp_predictor(EMBED_DIM, MLP_DIM)
    first, second = (layer for layer in predictor.layers if isinstance(layer, nn.Linear))
    inner = pooled @ first.weight.T + first.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    torch.testing.assert_close(predictor(pooled), inner @ second.weight.T + second.bias)
    assert first.out_features == MLP_DIM


def test_identity_returns_its_input_and_has_no_weights(pooled: Tensor) -> None:
    predictor = identity_predictor(EMBED_DIM, MLP_DIM)
    assert torch.equal(predictor(pooled), pooled)
    assert not list(predictor.parameters())
