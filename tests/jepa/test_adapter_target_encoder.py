"""Averaged adapters in the place of the online ones: against merged weights, and what it must leave as it was."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dllm_jepa.jepa import EMAAdapterTargetEncoder, ema_adapter_target_encoder, pool
from dllm_jepa.models import MaskedDiffusionLM, is_adapter
from dllm_jepa.models.dream import dream, lora_dream
from dllm_jepa.models.llada import llada, lora_llada

SIZES = {
    "vocab_size": 48,
    "embed_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 48,
    "max_seq_len": 16,
}
BUILDERS: dict[str, Any] = {"llada": (llada, lora_llada), "dream": (dream, lora_dream)}
SCALING = 1.5
TOKENS = torch.randint(0, 48, (3, 9), generator=torch.Generator().manual_seed(1))
REAL = torch.arange(9) < torch.tensor([9, 5, 7])[:, None]
SEQUENCE_IDS = torch.where(REAL & (TOKENS % 3 > 0), torch.arange(3)[:, None], -1)
POSITIONS = torch.arange(9).expand(3, 9) + 2

families = pytest.mark.parametrize("family", ["llada", "dream"])
kinds = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])


def plain_model(family: str) -> MaskedDiffusionLM:
    torch.manual_seed(0)
    model: MaskedDiffusionLM = BUILDERS[family][0](**SIZES)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.normal_(std=0.1).add_(name.endswith("scale"))
    return model.eval()


def online_model(family: str, use_dora: bool = False, dropout: float = 0.0) -> MaskedDiffusionLM:
    """Adapters that change nothing yet, in training mode."""
    model: MaskedDiffusionLM = BUILDERS[family][1](
        **SIZES,
        lora_attn_modules=["q_proj", "k_proj", "output_proj"],
        apply_lora_to_mlp=True,
        lora_rank=4,
        lora_alpha=4 * SCALING,
        lora_dropout=dropout,
        use_dora=use_dora,
    )
    model.load_state_dict(plain_model(family).state_dict(), strict=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("lora_a.weight"):
                param.uniform_(-0.2, 0.2)
            elif name.endswith("lora_b.weight"):
                param.zero_()
            elif name.endswith("magnitude"):
                param.copy_(torch.linalg.norm(model.get_parameter(name.replace("magnitude", "weight")), dim=1))
    return model.train()


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if is_adapter(name)}


def copies(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def take_a_step(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in adapters(model).values():
        param.add_(torch.empty_like(param).uniform_(-0.1, 0.1, generator=generator))


def embed(encoder: EMAAdapterTargetEncoder, **changes: Any) -> Tensor:
    return encoder.embed(TOKENS, SEQUENCE_IDS, 3, **({"mask": REAL, "input_pos": POSITIONS} | changes))


def plain_embedding(model: MaskedDiffusionLM, *, layer_norm: bool = True) -> Tensor:
    hidden = model(TOKENS, attention_mask=REAL, input_pos=POSITIONS)
    return pool(hidden, SEQUENCE_IDS, 3, layer_norm=layer_norm)


def merged(family: str, tensors: dict[str, Tensor]) -> MaskedDiffusionLM:
    model = plain_model(family)
    with torch.no_grad():
        for name in (name.removesuffix(".lora_a.weight") for name in tensors if name.endswith("lora_a.weight")):
            param = model.get_parameter(f"{name}.weight")
            weight = param.double()
            weight += SCALING * tensors[f"{name}.lora_b.weight"].double() @ tensors[f"{name}.lora_a.weight"].double()
            if f"{name}.magnitude" in tensors:
                weight *= (tensors[f"{name}.magnitude"].double() / weight.pow(2).sum(1).sqrt())[:, None]
            param.copy_(weight)
    return model


def moved(
    family: str, use_dora: bool = False, dropout: float = 0.0
) -> tuple[MaskedDiffusionLM, EMAAdapterTargetEncoder]:
    """An online model and averages that have gone different ways."""
    model = online_model(family, use_dora, dropout)
    encoder = ema_adapter_target_encoder(model, ema_decay=0.7)
    for step in range(5):
        take_a_step(model, seed=step)
        encoder.update(model.backbone)
    return model, encoder


@kinds
@pytest.mark.parametrize("ema_decay", [0.996, 0.9, 0.0])
def test_after_n_updates_it_equals_its_closed_form(ema_decay: float, use_dora: bool) -> None:
    """tau^n theta_0 + (1 - tau) sum_k tau^(n - k) theta_k, in fp64; embedding in between changes nothing."""
    model, steps = online_model("llada", use_dora), 30
    encoder = EMAAdapterTargetEncoder(model, ema_decay=ema_decay)
    trajectory = [copies(adapters(model))]
    for step in range(steps):
        take_a_step(model, seed=step)
        encoder.update(model.backbone)
        if step % 10 == 3:
            embed(encoder)
        trajectory.append(copies(adapters(model)))
    assert encoder.tensors().keys() == trajectory[0].keys()
    for name, average in encoder.tensors().items():
        expected = ema_decay**steps * trajectory[0][name].double()
        for k in range(1, steps + 1):
            expected = expected + (1 - ema_decay) * ema_decay ** (steps - k) * trajectory[k][name].double()
        torch.testing.assert_close(average.double(), expected, atol=1e-6, rtol=1e-5)


@families
@kinds
@pytest.mark.parametrize("layer_norm", [True, False])
@torch.no_grad()
def test_it_embeds_as_the_model_with_the_averages_merged(family: str, use_dora: bool, layer_norm: bool) -> None:
    model, encoder = moved(family, use_dora)
    embedded = embed(encoder, layer_norm=layer_norm)
    assert embedded.shape == (3, 32) and embedded.dtype == torch.float32
    expected = plain_embedding(merged(family, encoder.tensors()), layer_norm=layer_norm)
    torch.testing.assert_close(embedded, expected, atol=1e-5, rtol=0)
    online = plain_embedding(merged(family, copies(adapters(model))), layer_norm=layer_norm)
    assert (embedded - online).abs().max() > 0.01
    # The mask and the positions have arrived.
    assert (embed(encoder, layer_norm=layer_norm, mask=None) - embedded).abs().max() > 0.01
    uneven = POSITIONS * torch.arange(9)
    assert (embed(encoder, layer_norm=layer_norm, input_pos=uneven.clamp(max=15)) - embedded).abs().max() > 1e-3


@families
@kinds
def test_it_starts_as_the_base_itself(family: str, use_dora: bool) -> None:
    model = online_model(family, use_dora, dropout=0.5)
    encoder = ema_adapter_target_encoder(model)
    assert encoder.ema_decay == 0.996
    take_a_step(model, seed=0)
    assert torch.equal(embed(encoder), plain_embedding(plain_model(family)))
    visible = (SEQUENCE_IDS.flatten() >= 0).nonzero().flatten()
    assert 0 < len(visible) < TOKENS.numel()
    torch.testing.assert_close(embed(encoder, visible=visible), embed(encoder), rtol=1e-5, atol=1e-5)
    assert (embed(encoder, visible=visible[:-1]) - embed(encoder)).abs().max() > 1e-3
    assert not embed(encoder).requires_grad


def fail(*args: Any) -> None:
    raise RuntimeError("out of memory")


@kinds
@pytest.mark.parametrize("fails", [False, True], ids=["works", "raises"])
def test_embedding_leaves_everything_as_it_was(fails: bool, use_dora: bool) -> None:
    model, encoder = moved("dream", use_dora, dropout=0.5)
    params = dict(model.named_parameters())
    take_a_step(model, seed=9)
    model.token_logits(TOKENS).logsumexp(-1).sum().backward()
    before = copies(model.state_dict()), copies(encoder.tensors())
    gradients = {name: param.grad.clone() for name, param in params.items() if param.grad is not None}
    if fails:
        handle = model.backbone.layers[1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            embed(encoder)
        handle.remove()
    else:
        embed(encoder)
    after = dict(model.state_dict()), dict(encoder.tensors())
    for tensors, expected in zip(after, before, strict=True):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    assert all(
        param is params[name] and param.requires_grad == is_adapter(name) for name, param in model.named_parameters()
    )
    assert gradients.keys() == adapters(model).keys()
    assert all(torch.equal(params[name].grad, gradient) for name, gradient in gradients.items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_only_while_it_embeds(training: bool) -> None:
    model, encoder = moved("llada", dropout=0.5)
    seen: list[bool] = []
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert len(dropouts) == 12
    for module in dropouts:
        module.register_forward_hook(lambda module, *_: seen.append(module.training))
    model.train(training)
    assert torch.equal(embed(encoder), embed(encoder))
    assert seen == [False] * 24
    assert all(module.training == training for module in model.modules())
    first, second = (model.token_logits(TOKENS) for _ in range(2))
    assert torch.equal(first, second) != training


@families
@kinds
def test_gradients_after_it_embedded_are_those_of_the_online_adapters(family: str, use_dora: bool) -> None:
    model, encoder = moved(family, use_dora)
    untouched = copy.deepcopy(model)
    targets = embed(encoder)
    for candidate in (model, untouched):
        (plain_embedding(candidate) * targets).sum().backward()
    expected = adapters(untouched)
    for name, param in adapters(model).items():
        assert param.grad is not None and param.grad.any()
        assert torch.equal(param.grad, expected[name].grad)


def test_it_holds_one_fp32_average_an_adapter() -> None:
    model = online_model("llada", use_dora=True).to(torch.bfloat16)
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            if param.requires_grad:
                module.register_parameter(name, nn.Parameter(param.detach().float()))
    encoder = ema_adapter_target_encoder(model)
    held: list[Tensor] = []
    for value in vars(encoder).values():
        values = value.values() if isinstance(value, dict) else [value]
        held += [item for item in values if isinstance(item, Tensor)]
    own = {id(param) for param in model.parameters()}
    added = [tensor for tensor in held if id(tensor) not in own]
    trained = adapters(model).values()
    assert sorted(tuple(t.shape) for t in added) == sorted(tuple(p.shape) for p in trained)
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in added)
    storages = {param.untyped_storage().data_ptr() for param in model.parameters()}
    assert not any(tensor.untyped_storage().data_ptr() in storages for tensor in added)
    assert encoder.tensors().keys() == adapters(model).keys()
    # Live: what is loaded into them is what embeds.
    for tensor in encoder.tensors().values():
        tensor.zero_()
    assert all(not tensor.any() for tensor in added)


def half_precision(model: nn.Module) -> None:
    model.to(torch.bfloat16)


def one_in_bf16(model: nn.Module) -> None:
    model.get_submodule("backbone.layers.1.mlp.w2.lora_b").to(torch.bfloat16)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (half_precision, r"averages are kept in fp32, got adapters of torch\.bfloat16$"),
        (one_in_bf16, r"averages are kept in fp32, got adapters of torch\.bfloat16$"),
        (lambda model: model.requires_grad_(False), "has no adapters on a frozen base"),
        (
            lambda model: model.requires_grad_(True),
            "has no adapters on a frozen base; average its backbone by ema_target_e",
        ),
    ],
)
def test_a_model_without_fp32_adapters_on_a_frozen_base_is_refused(
    spoil: Callable[[nn.Module], None], message: str
) -> None:
    model = online_model("llada")
    spoil(model)
    with pytest.raises(ValueError, match=message):
        ema_adapter_target_encoder(model)


@pytest.mark.parametrize("ema_decay", [-0.001, 1.0, 1.5, float("nan")])
def test_the_decay_is_checked(ema_decay: float) -> None:
    with pytest.raises(ValueError, match=rf"ema_decay must be in \[0, 1\), got {ema_decay}"):
        ema_adapter_target_encoder(online_model("llada"), ema_decay=ema_decay)
