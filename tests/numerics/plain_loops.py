"""The objective: plain loops that run every sequence alone, on full logits, without packing.

Shape legend: T tokens of one sequence, D hidden, V vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from dllm_jepa.jepa import EMATargetEncoder, LossWeight, Predictor, Views
from dllm_jepa.models import MaskedDiffusionLM

Sequence = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], Views]
"""Clean tokens [T], maskable [T] and views of one sequence."""


def use_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library's `tensor.float()` give double precision; only the losses of bands stay in fp32.

    It computes norms, pooling and losses in fp32, whatever the type of the model. Without that cast, what differs from
    the loops is wrong, not rounded.
    """
    monkeypatch.setattr(Tensor, "float", Tensor.double)


@dataclass
class Parts:
    """Everything with weights."""

    model: MaskedDiffusionLM
    predictor: Predictor
    target_encoder: EMATargetEncoder

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(nn.ModuleDict({"model": self.model, "predictor": self.predictor}).named_parameters())

    def randomize(self) -> None:
        """Fill every weight, norm scales and biases too; the target encoder gets others than the online backbone."""
        torch.manual_seed(0)
        for module in (self.model, self.predictor, self.target_encoder.backbone):
            for param in module.parameters():
                nn.init.normal_(param, 1.0 if param.ndim == 1 else 0.0, 0.3)

    def take_gradients(self) -> dict[str, Tensor]:
        """The gradients of all trained weights (zero where there is none), removed."""
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.trained().items()}
        for param in self.trained().values():
            param.grad = None
        return gradients


def pool_by_hand(hidden: Tensor, masked: npt.NDArray[np.bool_], layer_norm: bool) -> Tensor:
    """[T, D] to [D]."""
    total, count = torch.zeros_like(hidden[0]), 0
    for position in range(len(masked)):
        if not masked[position]:
            total, count = total + hidden[position], count + 1
    mean = total / count
    if not layer_norm:
        return mean
    centred = mean - mean.sum() / len(mean)
    return centred / ((centred * centred).sum() / len(mean) + 1e-5).sqrt()


def cosine_by_hand(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()


def losses_by_hand(
    parts: Parts,
    sequences: list[Sequence],
    *,
    loss_weight: LossWeight,
    layer_norm: bool,
    partners: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """L_diff and L_jepa of a global batch, sequence by sequence and token by token; no packing, no padding."""
    with torch.no_grad():
        targets = [
            pool_by_hand(
                parts.target_encoder.backbone(torch.from_numpy(views.target.tokens)[None])[0],
                views.target.masked,
                layer_norm,
            )
            for _, _, views in sequences
        ]
    head = parts.model.head
    assert head is not None
    diffusion, alignment, num_masked = torch.zeros(()).double(), torch.zeros(()).double(), 0
    for number, (tokens, maskable, views) in enumerate(sequences):
        context = views.context
        hidden = parts.model.backbone(torch.from_numpy(context.tokens)[None])[0]  # [T, D]
        logits = hidden @ head.weight.T  # [T, V]
        token_losses = []
        for position, is_masked in enumerate(context.masked):
            if is_masked:
                scores = logits[position - 1 if parts.model.shift_logits else position]
                token_losses.append(scores.exp().sum().log() - scores[int(tokens[position])])
        if loss_weight == "mean":
            diffusion = diffusion + sum(token_losses, torch.zeros(())) / len(token_losses)
        elif loss_weight == "inverse_ratio":
            diffusion = diffusion + sum(token_losses, torch.zeros(())) / context.mask_ratio / int(maskable.sum())
        else:
            diffusion = diffusion + sum(token_losses, torch.zeros(()))
        num_masked += len(token_losses)
        pred = parts.predictor(pool_by_hand(hidden, context.masked, layer_norm)[None])[0]
        target = targets[number if partners is None else partners[number]]
        alignment = alignment + 1 - cosine_by_hand(pred, target)
    return diffusion / (num_masked if loss_weight == "token" else len(sequences)), alignment / len(sequences)


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest entry of each gradient."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, f"the reference has no gradient at {name}"
        assert float((found[name] - gradient).abs().max()) <= tolerance * scale, name
