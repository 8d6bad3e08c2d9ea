"""The L2-to-base penalty, against autograd."""

import pytest
import torch
from torch import Tensor, nn

from dllm_jepa.jepa import L2Anchor


def model_and_inputs() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(7, 4, dtype=torch.float64)


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param))


@pytest.mark.parametrize("weight", [1e-4, 0.3])
def test_value_and_gradient_are_those_of_autograd(weight: float) -> None:
    model, inputs = model_and_inputs()
    base = [param.detach().clone() for param in model.parameters()]
    anchor = L2Anchor(model, weight=weight)
    move(model)

    distance = torch.stack([(p - b).square().sum() for p, b in zip(model.parameters(), base, strict=True)]).sum()
    (model(inputs).square().mean() + weight * distance).backward()
    expected = [param.grad for param in model.parameters()]
    model.zero_grad()

    model(inputs).square().mean().backward()
    penalty = anchor.add_gradient()
    assert not penalty.requires_grad
    # The value is summed in fp32.
    torch.testing.assert_close(float(penalty), weight * float(distance.detach()), rtol=1e-6, atol=0)
    for param, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(param.grad, gradient, rtol=1e-12, atol=1e-12)


def test_at_the_base_it_pulls_nowhere() -> None:
    model, inputs = model_and_inputs()
    anchor = L2Anchor(model, weight=0.5)
    model(inputs).sum().backward()
    before = [param.grad.clone() for param in model.parameters() if param.grad is not None]
    assert float(anchor.add_gradient()) == 0
    for param, gradient in zip(model.parameters(), before, strict=True):
        assert torch.equal(param.grad, gradient) if param.grad is not None else False


def test_bf16_gradients_keep_their_type() -> None:
    model, inputs = model_and_inputs()
    model.bfloat16()
    anchor = L2Anchor(model, weight=0.5)
    model(inputs.bfloat16()).sum().backward()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(1)
    penalty = anchor.add_gradient()
    assert all(param.grad is not None and param.grad.dtype == torch.bfloat16 for param in model.parameters())
    num_weights = sum(param.numel() for param in model.parameters())
    # bf16 keeps 8 bits of the moved weights.
    assert float(penalty) == pytest.approx(0.5 * num_weights, rel=0.02)


def test_a_shared_weight_is_held_once() -> None:
    first = nn.Linear(3, 3, bias=False)
    anchor = L2Anchor(nn.Sequential(first, first), weight=1.0)
    with torch.no_grad():
        first.weight += 2
    assert float(anchor.add_gradient()) == pytest.approx(9 * 4, rel=1e-6)


def test_the_base_can_be_restored_in_place() -> None:
    model, _ = model_and_inputs()
    anchor = L2Anchor(model, weight=1.0)
    start = [param.detach().clone() for param in model.parameters()]
    move(model)
    for base, expected in zip(anchor.tensors().values(), start, strict=True):
        assert torch.equal(base, expected)
    for base, param in zip(anchor.tensors().values(), model.parameters(), strict=True):
        base.copy_(param.detach())
    assert float(anchor.add_gradient()) == 0


def test_a_module_without_parameters_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no parameters"):
        L2Anchor(nn.ReLU(), weight=1.0).add_gradient()
