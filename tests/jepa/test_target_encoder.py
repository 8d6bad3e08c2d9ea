"""The exponential moving average, against its closed form, and what it must never do."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dllm_jepa.jepa import EMATargetEncoder, _stochastic_rounding, ema_target_encoder, pool
from dllm_jepa.models import use_float8


class TinyBackbone(nn.Module):
    """[B, T] to [B, T, D], with dropout and with packing arguments that change the output."""

    def __init__(self, embed_dim: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, embed_dim)
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        hidden_at: Tensor | None = None,
    ) -> Tensor:
        hidden: Tensor = self.out(self.dropout(self.embedding(tokens)))
        if input_pos is not None:
            hidden = hidden * (1 + input_pos[..., None])
        hidden = hidden if mask is None else hidden * mask[..., None]
        return hidden if hidden_at is None else hidden.flatten(0, 1)[hidden_at].unsqueeze(0)


def weights(module: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in module.parameters()]


@pytest.mark.parametrize("ema_decay", [0.996, 0.9, 0.0])
def test_after_n_updates_it_equals_its_closed_form(ema_decay: float) -> None:
    """tau^n theta_0 + (1 - tau) sum_k tau^(n - k) theta_k, in fp64, for n = 50 moving weights."""
    generator = torch.Generator().manual_seed(0)
    online, steps = TinyBackbone(), 50
    encoder = EMATargetEncoder(TinyBackbone(), ema_decay=ema_decay)
    encoder.copy_from(online)
    trajectory = [weights(online)]
    for _ in range(steps):
        with torch.no_grad():
            for param in online.parameters():
                param.add_(torch.randn(param.shape, generator=generator), alpha=0.1)
        encoder.update(online)
        trajectory.append(weights(online))
    for position, average in enumerate(encoder.backbone.parameters()):
        path = [point[position].double() for point in trajectory]
        expected = ema_decay**steps * path[0]
        for k in range(1, steps + 1):
            expected = expected + (1 - ema_decay) * ema_decay ** (steps - k) * path[k]
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected, atol=1e-6, rtol=1e-5)


def test_it_starts_as_a_copy_that_the_online_weights_do_not_move() -> None:
    online, encoder = TinyBackbone(), EMATargetEncoder(TinyBackbone(), ema_decay=0.5)
    before = weights(online)
    assert not torch.equal(next(encoder.backbone.parameters()), before[0])
    encoder.copy_from(online)
    with torch.no_grad():
        for param in online.parameters():
            param.zero_()
    for average, start in zip(encoder.backbone.parameters(), before, strict=True):
        assert torch.equal(average, start)


def test_an_update_leaves_the_online_weights_alone() -> None:
    online, encoder = TinyBackbone(), EMATargetEncoder(TinyBackbone(), ema_decay=0.5)
    before = weights(online)
    encoder.update(online)
    for param, start in zip(online.parameters(), before, strict=True):
        assert torch.equal(param, start) and param.requires_grad


@pytest.mark.parametrize("online_dtype", [torch.float32, torch.bfloat16])
def test_small_updates_are_not_lost(online_dtype: torch.dtype) -> None:
    """Weights near 0.02, the online ones 1 % away: 0.4 % of that moves all averages."""
    encoder = EMATargetEncoder(TinyBackbone(), ema_decay=0.996)
    online = TinyBackbone().to(online_dtype)
    with torch.no_grad():
        for param in encoder.backbone.parameters():
            param.fill_(0.02)
        for param in online.parameters():
            param.fill_(0.0202)
    start = torch.tensor(0.02)
    encoder.update(online)
    step = 0.004 * (next(online.parameters()).flatten()[0].item() - start.item())
    for average in encoder.backbone.parameters():
        moved = average - start
        torch.testing.assert_close(moved, torch.full_like(moved, step), atol=2e-9, rtol=0)
        assert torch.equal(average.bfloat16(), start.bfloat16().expand_as(average))


class OneWeight(nn.Module):
    """A parameter of many equal elements, so that their mean has a small statistical error."""

    def __init__(self, value: float, dtype: torch.dtype, count: int = 2**16) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((count // 16, 16), value, dtype=dtype))


@pytest.mark.parametrize("online_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("ema_decay", [0.996, 0.9])
def test_the_mean_of_a_bf16_average_is_the_closed_form(ema_decay: float, sign: int, online_dtype: torch.dtype) -> None:
    """Unbiased in every step, whatever was rounded before: the closed form holds for the mean of 2**16 elements."""
    torch.manual_seed(0)
    steps, bf16_step = 200, 2**-7  # of the numbers in [1, 2), where all weights stay
    encoder = EMATargetEncoder(OneWeight(sign * 1.25, torch.bfloat16), ema_decay=ema_decay)
    expected = sign * 1.25
    for step in range(steps):
        online = OneWeight(sign * (1.3 + 0.1 * math.sin(step / 40)), online_dtype)
        encoder.update(online)
        expected = ema_decay * expected + (1 - ema_decay) * online.weight[0, 0].item()
    (average,) = encoder.backbone.parameters()
    assert average.dtype == torch.bfloat16
    # A rounding has a variance of at most bf16_step**2 / 4, and tau**2 of it is left after the next update.
    deviation = bf16_step / 2 / math.sqrt((1 - ema_decay**2) * average.numel())
    assert abs(average.double().mean().item() - expected) < 5 * deviation
    assert 5 * deviation < 0.12 * bf16_step, "round-to-nearest could pass"


def test_a_bf16_average_is_not_moved_by_the_same_weights() -> None:
    online = TinyBackbone().to(torch.bfloat16)
    encoder = EMATargetEncoder(TinyBackbone().to(torch.bfloat16), ema_decay=0.996)
    encoder.copy_from(online)
    encoder.update(online)
    for average, param in zip(encoder.backbone.parameters(), online.parameters(), strict=True):
        assert torch.equal(average, param)


@pytest.mark.parametrize("chunk", [1, 7, 66, 1000])
def test_the_size_of_a_chunk_does_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """TinyBackbone has tensors of 66, 36 and 6 elements."""

    def updated() -> list[Tensor]:
        torch.manual_seed(0)
        encoder = EMATargetEncoder(TinyBackbone().to(torch.bfloat16), ema_decay=0.996)
        encoder.update(TinyBackbone())
        return weights(encoder.backbone)

    whole = updated()
    monkeypatch.setattr(_stochastic_rounding, "_CHUNK", chunk)
    for average, expected in zip(updated(), whole, strict=True):
        assert torch.equal(average, expected)


def test_no_temporary_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stochastic_rounding, "_CHUNK", 1000)
    encoder = EMATargetEncoder(OneWeight(1.0, torch.bfloat16), ema_decay=0.9)
    online, largest = OneWeight(1.5, torch.bfloat16), 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            known = {param.untyped_storage().data_ptr() for param in (encoder.backbone.weight, online.weight)}
            new = [part for part in tree_leaves(out) if isinstance(part, Tensor)]
            sizes = [part.numel() for part in new if part.untyped_storage().data_ptr() not in known]
            largest = max([largest, *sizes])
            return out

    with Sizes():
        encoder.update(online)
    assert largest == 1000


@pytest.mark.parametrize("dtypes", [{torch.float16}, {torch.float32, torch.bfloat16}, {torch.bfloat16, torch.float64}])
def test_other_types_and_mixtures_are_refused(dtypes: set[torch.dtype]) -> None:
    backbone = TinyBackbone()
    for module, dtype in zip((backbone.embedding, backbone.out), itertools.cycle(dtypes), strict=False):
        module.to(dtype)
    listed = ", ".join(sorted(map(str, dtypes)))
    with pytest.raises(ValueError, match=f"must be all fp32 or all bf16, got {listed}$"):
        EMATargetEncoder(backbone, ema_decay=0.996)


class Online(nn.Module):
    """A model with a backbone, and what makes others like it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = TinyBackbone(embed_dim=32)
        self.asked: list[tuple[str, bool]] = []

    def copy_backbone(self, dtype: str, *, float8: bool = False) -> nn.Module:
        self.asked.append((dtype, float8))
        return TinyBackbone(embed_dim=32).to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])


@pytest.mark.parametrize(
    ("arguments", "asked"), [({}, ("fp32", False)), ({"dtype": "bf16", "float8": True}, ("bf16", True))]
)
def test_the_builder_averages_a_copy_of_the_online_backbone(arguments: Any, asked: tuple[str, bool]) -> None:
    online = Online()
    encoder = ema_target_encoder(online, online.copy_backbone, **arguments)
    assert online.asked == [asked] and encoder.ema_decay == 0.996
    for average, param in zip(encoder.backbone.parameters(), online.backbone.parameters(), strict=True):
        assert torch.equal(average, param.to(average.dtype)) and average.data_ptr() != param.data_ptr()
    head = torch.ones(1)
    exported = encoder.weights({"head.weight": head, "backbone.out.bias": head})
    assert exported["head.weight"] is head
    assert torch.equal(exported["backbone.out.bias"], encoder.backbone.get_submodule("out").get_parameter("bias"))


@pytest.mark.parametrize("ema_decay", [-0.001, 1.0, math.nan])
def test_the_decay_is_checked(ema_decay: float) -> None:
    with pytest.raises(ValueError, match=rf"ema_decay must be in \[0, 1\), got {ema_decay}"):
        EMATargetEncoder(TinyBackbone(), ema_decay=ema_decay)


@pytest.mark.parametrize("layer_norm", [True, False])
def test_embeds_as_backbone_and_pool_without_gradient(layer_norm: bool) -> None:
    torch.manual_seed(0)
    encoder = EMATargetEncoder(TinyBackbone(), ema_decay=0.996)
    tokens = torch.randint(0, 11, (2, 5))
    sequence_ids = torch.tensor([[0, 0, -1, 0, -1], [1, -1, 1, -1, -1]])
    packing = {"mask": torch.tensor([[1.0, 2, 3, 4, 5]] * 2), "input_pos": torch.arange(5).expand(2, 5)}
    embedded = encoder.embed(tokens, sequence_ids, 2, layer_norm=layer_norm, **packing)
    assert embedded.shape == (2, 6) and not embedded.requires_grad
    expected = pool(encoder.backbone(tokens, **packing), sequence_ids, 2, layer_norm=layer_norm)
    # Equal twice over: dropout is off, and the mask and positions have arrived.
    assert torch.equal(embedded, expected)
    assert not torch.equal(embedded, encoder.embed(tokens, sequence_ids, 2, layer_norm=layer_norm))
    visible = torch.tensor([0, 1, 3, 5, 7])  # the positions of all ids but -1
    torch.testing.assert_close(
        encoder.embed(tokens, sequence_ids, 2, visible=visible, **packing),
        pool(encoder.backbone(tokens, **packing), sequence_ids, 2),
    )
    without_one = encoder.embed(tokens, sequence_ids, 2, visible=visible[1:], **packing)
    assert (without_one - embedded)[0].abs().max() > 1e-3


def test_nothing_in_it_can_be_trained() -> None:
    encoder = EMATargetEncoder(TinyBackbone().train(), ema_decay=0.996)
    assert not any(param.requires_grad for param in encoder.backbone.parameters())
    assert not any(module.training for module in encoder.backbone.modules())
    for _ in range(2):
        encoder.update(TinyBackbone())
    assert all(not p.requires_grad and p.grad is None and p.is_leaf for p in encoder.backbone.parameters())


def test_another_architecture_is_refused() -> None:
    online = nn.Sequential(*itertools.islice(TinyBackbone().children(), 1))
    with pytest.raises((ValueError, RuntimeError)):
        EMATargetEncoder(TinyBackbone(), ema_decay=0.996).copy_from(online)


def float8_pair(dtype: str) -> tuple[EMATargetEncoder, EMATargetEncoder]:
    """The same average without float8 and with it."""
    parameters = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    torch.manual_seed(0)
    plain = TinyBackbone(embed_dim=32).to(parameters)
    torch.manual_seed(0)
    float8 = use_float8(TinyBackbone(embed_dim=32).to(parameters), emulate=True)
    return EMATargetEncoder(plain, ema_decay=0.996), EMATargetEncoder(float8, ema_decay=0.996)


@pytest.mark.parametrize("online_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_float8_products_leave_the_average_as_it_is(dtype: str, online_dtype: torch.dtype) -> None:
    """Bit for bit, over updates with forwards between them, under the same names."""
    encoders = float8_pair(dtype)
    for encoder in encoders:
        torch.manual_seed(1)
        online = TinyBackbone(embed_dim=32).to(online_dtype)
        encoder.copy_from(online)
        for average, param in zip(encoder.backbone.parameters(), online.parameters(), strict=True):
            assert torch.equal(average, param.to(average.dtype))
        for _ in range(3):
            with torch.no_grad():
                for param in online.parameters():
                    param += 0.1 * torch.randn_like(param)
            encoder.embed(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64), 1)
            encoder.update(online)
    plain, float8 = (encoder.tensors() for encoder in encoders)
    assert [*float8] == [*plain]
    assert all(torch.equal(float8[name], plain[name]) and float8[name].dtype == plain[name].dtype for name in plain)


def test_float8_products_embed_nearly_the_same_and_without_gradient() -> None:
    plain, float8 = float8_pair("fp32")
    tokens, sequence_ids = torch.randint(0, 11, (2, 5)), torch.tensor([[0] * 5, [1] * 5])
    expected, embedded = (encoder.embed(tokens, sequence_ids, 2) for encoder in (plain, float8))
    assert embedded.dtype == torch.float32 and not embedded.requires_grad
    assert not any(param.requires_grad for param in float8.backbone.parameters())
    assert torch.cosine_similarity(embedded, expected, dim=-1).min() > 0.99
    assert not torch.equal(embedded, expected)
