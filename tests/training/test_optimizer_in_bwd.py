"""The step within the backward pass, against the usual order: backward, norm, step."""

import math

import pytest
import torch
from torch import Tensor, nn

from dllm_jepa.training._optimizers import OptimizerInBackward

STEPS = 5


class TinyLM(nn.Module):
    """An LM whose head is its embedding, with a frozen weight and one that only every second step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.extra = nn.Linear(8, 8, bias=False)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, *, with_extra: bool) -> Tensor:
        hidden = self.frozen(self.embedding(tokens))
        for layer in self.layers:
            hidden = hidden + layer(hidden).tanh()
        logits: Tensor = self.head(self.extra(hidden) if with_extra else hidden)
        return logits


def model_and_optimizer(dtype: torch.dtype = torch.float32) -> tuple[TinyLM, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = TinyLM().to(dtype)
    decayed = list(model.layers.parameters())
    others = [param for param in model.parameters() if not any(param is one for one in decayed)]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}]
    return model, torch.optim.AdamW(groups, lr=0.01)


def loss_of(model: TinyLM, step: int) -> Tensor:
    tokens = torch.randint(0, 13, (2, 6), generator=torch.Generator().manual_seed(step))
    logits = model(tokens, with_extra=step % 2 == 0)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.roll(1).flatten())


def train_in_the_usual_order() -> tuple[TinyLM, torch.optim.AdamW, list[Tensor]]:
    model, adam = model_and_optimizer()
    scheduler = torch.optim.lr_scheduler.ExponentialLR(adam, 0.5)
    norms = []
    for step in range(STEPS):
        loss_of(model, step).backward()
        norms.append(nn.utils.clip_grad_norm_([p for g in adam.param_groups for p in g["params"]], math.inf))
        adam.step()
        adam.zero_grad(set_to_none=True)
        scheduler.step()
    return model, adam, norms


def test_weights_state_and_norm_are_those_of_the_usual_order() -> None:
    """To the bit, with a tied weight, a frozen one, one without a gradient on some steps, two groups, a schedule."""
    expected, expected_adam, expected_norms = train_in_the_usual_order()
    model, adam = model_and_optimizer()
    in_backward = OptimizerInBackward(adam)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(adam, 0.5)
    norms = []
    for step in range(STEPS):
        loss_of(model, step).backward()
        norms.append(in_backward.pop_grad_norm())
        assert all(param.grad is None for param in model.parameters())
        scheduler.step()
    assert all(norm.shape == () and norm.dtype == torch.float32 for norm in norms)
    assert [norm.item() for norm in norms] == [norm.item() for norm in expected_norms]
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(adam.state_dict(), expected_adam.state_dict(), atol=0, rtol=0)
    steps = [int(adam.state[weight]["step"]) for weight in (model.embedding.weight, model.extra.weight)]
    assert steps == [STEPS, 3], "one step per gradient: neither two for the tied weight, nor one without a gradient"
    assert not torch.equal(model.embedding.weight, TinyLM().embedding.weight)


def test_one_gradient_exists_at_a_time() -> None:
    model, adam = model_and_optimizer()
    trained = [param for param in model.parameters() if param.requires_grad]
    seen: list[list[int]] = []

    def look(_: Tensor) -> None:
        seen.append([position for position, param in enumerate(trained) if param.grad is not None])

    for param in trained:  # before the optimizer's own hooks, so that the gradient is still there
        param.register_post_accumulate_grad_hook(look)
    OptimizerInBackward(adam)
    loss_of(model, 0).backward()
    assert sorted(seen) == [[position] for position in range(len(trained))]


def test_the_norm_of_bf16_gradients_is_computed_in_fp32() -> None:
    reference, _ = model_and_optimizer(torch.bfloat16)
    loss_of(reference, 0).backward()
    squares = [param.grad.double().square().sum() for param in reference.parameters() if param.grad is not None]
    model, adam = model_and_optimizer(torch.bfloat16)
    in_backward = OptimizerInBackward(adam)
    loss_of(model, 0).backward()
    assert in_backward.pop_grad_norm().item() == pytest.approx(math.sqrt(sum(squares)), rel=1e-6)


def test_a_norm_is_given_once() -> None:
    model, adam = model_and_optimizer()
    in_backward = OptimizerInBackward(adam)
    loss_of(model, 0).backward()
    assert in_backward.pop_grad_norm() > 0
    assert in_backward.pop_grad_norm() == 0


def test_a_second_backward_pass_within_a_step_is_refused() -> None:
    model, adam = model_and_optimizer()
    in_backward = OptimizerInBackward(adam)
    loss_of(model, 0).backward()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match="second gradient within one step"):
        loss_of(model, 1).backward()
    assert all(torch.equal(param, start) for param, start in zip(model.parameters(), before, strict=True))
    in_backward.pop_grad_norm()
    model.zero_grad()
    loss_of(model, 1).backward()
