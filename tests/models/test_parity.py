"""Both backbones against what the published modelling code computed (fixtures in tests/assets)."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from dllm_jepa.jepa import pool
from dllm_jepa.models import MaskedDiffusionLM, load_hf

ASSETS = Path(__file__).parents[1] / "assets"
CASES = [(family, masking) for family in ("llada", "dream") for masking in ("nomask", "padmask")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[MaskedDiffusionLM, dict[str, Tensor], Tensor | None, str]:
    family, masking = request.param
    directory = ASSETS / f"{family}_tiny"
    reference = load_file(directory / "parity.safetensors")
    return load_hf(directory), reference, reference["attention_mask"] if masking == "padmask" else None, masking


def real_tokens(reference: dict[str, Tensor], attention_mask: Tensor | None) -> Tensor:
    """Where the reference means something: everywhere, or at the real tokens."""
    everywhere = torch.ones_like(reference["attention_mask"])
    return (everywhere if attention_mask is None else attention_mask).bool()


def aligned(logits: Tensor, model: MaskedDiffusionLM) -> Tensor:
    """Raw head outputs of the reference, moved so that entry i scores token i."""
    return torch.cat((logits[:, :1], logits[:, :-1]), 1) if model.shift_logits else logits


@torch.no_grad()
def test_logits(case) -> None:
    model, reference, attention_mask, masking = case
    logits = model.token_logits(reference["input_ids"], attention_mask=attention_mask)
    real = real_tokens(reference, attention_mask)
    expected = aligned(reference[f"logits_{masking}"], model)
    if model.shift_logits:  # the last real token's own state scores the pad behind it: compared one further left
        real = real & torch.cat((real[:, :1], real[:, :-1]), 1)
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=0)


@torch.no_grad()
def test_every_hidden_state(case) -> None:
    model, reference, attention_mask, masking = case
    states: dict[str, Tensor] = {}
    handles = [model.backbone.tok_embeddings.register_forward_hook(lambda *a: states.update(embed=a[-1]))]
    for number, layer in enumerate(model.backbone.layers):
        handles.append(layer.register_forward_hook(lambda *a, number=number: states.update({f"layer{number}": a[-1]})))
    states["final_norm"] = model(reference["input_ids"], attention_mask=attention_mask)
    for handle in handles:
        handle.remove()
    real = real_tokens(reference, attention_mask)
    assert len(states) == 2 + model.sizes.num_layers
    for name, state in states.items():
        torch.testing.assert_close(state[real], reference[f"hidden_{masking}.{name}"][real], atol=1e-4, rtol=0)


@torch.no_grad()
def test_losses_from_chosen_logits_only(case) -> None:
    model, reference, attention_mask, masking = case
    masked = reference["masked_positions"].bool()
    positions = masked.flatten().nonzero().flatten()
    logits = model.logits(model(reference["input_ids"], attention_mask=attention_mask), positions)
    assert logits.shape == (len(positions), model.sizes.vocab_size)
    losses = F.cross_entropy(logits, reference["clean_ids"].flatten()[positions], reduction="none")
    torch.testing.assert_close(losses.mean()[None], reference[f"loss_{masking}"], atol=1e-4, rtol=0)

    rows = positions // masked.size(1)
    weighted = losses / (reference["t"][rows] + 1e-6)
    maskable = reference["maskable_positions"].sum(1)
    per_row = torch.zeros(len(maskable)).index_add(0, rows, weighted)
    for kind, loss in (
        ("token", weighted.sum() / maskable.sum()),
        ("sequence", (per_row / maskable).mean()),
        ("batch", per_row.mean()),
    ):
        torch.testing.assert_close(loss[None], reference[f"dllm_loss_{kind}_{masking}"], atol=1e-4, rtol=1e-5)


@torch.no_grad()
def test_pooled_vectors(case) -> None:
    model, reference, attention_mask, masking = case
    hidden = model(reference["input_ids"], attention_mask=attention_mask)
    visible = reference["attention_mask"].bool() & ~reference["masked_positions"].bool()
    ids = torch.where(visible, torch.arange(len(visible))[:, None], -1)
    pooled = pool(hidden, ids, len(visible), layer_norm=False)
    torch.testing.assert_close(pooled, reference[f"pooled_{masking}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llada", "dream"])
@torch.no_grad()
def test_left_padding(family: str) -> None:
    model = load_hf(ASSETS / f"{family}_tiny")
    reference = load_file(ASSETS / f"{family}_tiny" / "parity.safetensors")
    tokens, real = reference["leftpad_input_ids"], reference["leftpad_attention_mask"].bool()
    # Published Dream counts positions from the first real token, LLaDA from the left edge.
    input_pos = (real.long().cumsum(1) - 1).clamp(min=0) if model.shift_logits else None
    hidden = model(tokens, attention_mask=real, input_pos=input_pos)
    torch.testing.assert_close(model.head(hidden)[real], reference["logits_leftpad"][real], atol=1e-4, rtol=0)
