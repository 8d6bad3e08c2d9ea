"""Float8 products against a plain implementation, and what they must leave alone: weights, names and files."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchao.float8.float8_linear import Float8Linear

from dllm_jepa.errors import ConfigError
from dllm_jepa.models import MaskedDiffusionLM, use_float8
from dllm_jepa.models.dream import dream
from dllm_jepa.models.llada import llada

SIZES = {"vocab_size": 50, "embed_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 96}


def build(builder: object = llada) -> MaskedDiffusionLM:
    torch.manual_seed(0)
    return builder(**SIZES, max_seq_len=32).eval()


def e4m3(value: float) -> float:
    """The nearest float8 number: 3 bits of mantissa, exponents from -6, ties to even; none is over 448."""
    if value == 0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(abs(value))), -6) - 3)
    return max(-448.0, min(448.0, round(value / step) * step))


def quantized(row: Tensor) -> list[float]:
    """A row scaled by the largest power of two that keeps it within 448, rounded, and scaled back."""
    largest = max(row.abs().max().item(), 1e-12)
    scale = 2.0 ** math.floor(math.log2(448 / largest))
    return [e4m3(value * scale) / scale for value in row.tolist()]


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Products of quantized rows, in fp64."""
    inputs = torch.tensor([quantized(row) for row in x.flatten(0, -2).float()], dtype=torch.float64)
    weights = torch.tensor([quantized(row) for row in weight.float()], dtype=torch.float64)
    out = inputs @ weights.T
    return (out if bias is None else out + bias.double()).unflatten(0, x.shape[:-1])


@pytest.mark.parametrize(("spread", "bias"), [(0.0, True), (3.0, False)])
def test_a_layer_is_that_of_a_plain_implementation(spread: float, bias: bool) -> None:
    """`spread` makes values of one row and of different rows differ by many powers of two, subnormal ones included."""
    torch.manual_seed(0)
    layer = nn.Linear(48, 32, bias=bias)
    x = torch.randn(2, 3, 48) * torch.exp(spread * torch.randn(2, 3, 48))
    with torch.no_grad():
        layer.weight *= torch.exp(spread * torch.randn(32, 48))
    expected = plain_linear(x, layer.weight.detach(), layer.bias)
    found = use_float8(nn.Sequential(layer), emulate=True)(x)
    size = plain_linear(x.abs(), layer.weight.detach().abs(), None)
    assert ((found - expected).abs() / size).max() < 1e-6
    assert ((layer(x) - expected).abs() / size).max() > 1e-3, "without float8 it would pass"


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_results_are_those_of_the_plain_implementation_rounded_once(autocast: bool) -> None:
    """In one process weights stay fp32, inputs of the layers are bf16, and autocast is on."""
    torch.manual_seed(0)
    layer = nn.Linear(48, 32, bias=False).to(torch.float32 if autocast else torch.bfloat16)
    x = torch.randn(5, 48).bfloat16()
    expected = plain_linear(x, layer.weight.detach(), None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        found = use_float8(nn.Sequential(layer), emulate=True)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("builder", [llada, dream])
def test_queries_keys_and_feed_forward_are_converted_and_nothing_else(builder: object) -> None:
    backbone, plain = build(builder).backbone, build(builder).backbone
    before = backbone.state_dict(keep_vars=True)
    assert use_float8(backbone, emulate=True) is backbone
    for (name, module), (expected_name, expected) in zip(backbone.named_modules(), plain.named_modules(), strict=True):
        converted = name.endswith(("q_proj", "k_proj", "w1", "w2", "w3"))
        assert name == expected_name
        assert type(module) is (Float8Linear if converted else type(expected))
    assert sum(isinstance(module, Float8Linear) for module in backbone.modules()) == 2 * 5
    after = backbone.state_dict(keep_vars=True)
    assert [*after] == [*before] and all(after[name] is before[name] for name in before)


def test_the_backbone_computes_nearly_the_same() -> None:
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = build().backbone(tokens)
        found = use_float8(build().backbone, emulate=True)(tokens)
    cosine = torch.cosine_similarity(found.flatten(0, 1), expected.flatten(0, 1), dim=-1)
    assert 0.99 < cosine.min() and cosine.max() < 1 - 1e-6


def test_a_token_does_not_depend_on_the_others_of_its_batch() -> None:
    torch.manual_seed(0)
    layer = use_float8(nn.Sequential(nn.Linear(64, 32)), emulate=True)
    token = torch.randn(1, 64)
    alone = layer(token)
    for factor in (1e-6, 3.0, 1e6):
        torch.testing.assert_close(layer(torch.cat([token, factor * torch.randn(4, 64)]))[:1], alone)


def test_an_output_does_not_depend_on_the_weights_of_the_others() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32), torch.randn(3, 64)
    before = use_float8(nn.Sequential(layer), emulate=True)(x)[:, :16]
    with torch.no_grad():
        layer.weight[16:] *= 1e6
    torch.testing.assert_close(use_float8(nn.Sequential(layer), emulate=True)(x)[:, :16], before)


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 32), (32, 24)])
def test_other_widths_are_refused(inputs: int, outputs: int) -> None:
    module = nn.ModuleDict({"first": nn.Linear(32, 32), "out": nn.Linear(inputs, outputs)})
    message = f"but out has {inputs} inputs and {outputs} outputs.*multiples of 16: set float8: false"
    with pytest.raises(ConfigError, match=message):
        use_float8(module, emulate=True)
    assert not any(isinstance(layer, Float8Linear) for layer in module.values())


def test_it_is_captured_whole_by_the_compiler() -> None:
    layer = use_float8(nn.Sequential(nn.Linear(64, 32)), emulate=True)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_computes_what_is_emulated(compiled: bool) -> None:
    """Both with bf16 results of the same quantized numbers; the GPU adds them up with fewer bits."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs a GPU of compute capability 8.9 or more")
    torch.manual_seed(0)
    layer = nn.Linear(1024, 512, bias=False, device="cuda").bfloat16()
    x = torch.randn(3, 100, 1024, device="cuda").bfloat16()
    found = use_float8(nn.Sequential(layer))
    if compiled:
        found = torch.compile(found)
    with torch.no_grad():
        expected = use_float8(nn.Sequential(layer), emulate=True)(x).float()
        difference = found(x).float() - expected
    assert difference.norm() / expected.norm() < 5e-3


def test_the_emulation_differs_from_the_products_of_a_gpu_in_nothing_else() -> None:
    real, emulated = (use_float8(nn.Sequential(nn.Linear(16, 16)), emulate=emulate)[0] for emulate in (False, True))
    assert replace(real.config, emulate=True) == emulated.config
    assert not real.config.emulate and emulated.config.emulate
