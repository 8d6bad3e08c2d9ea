"""Float8 products against a plain implementation, and what they must leave alone: weights, names and files."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchao.float8.float8_linear import Float8Linear

from dllm_jepa.errors import ConfigError
from dllm_jepa.jepa import EMATargetEncoder
from dllm_jepa.models import MaskedDiffusionLM, load_hf, save_hf, use_float8
from dllm_jepa.models.dream import dream
from dllm_jepa.models.llada import llada

SIZES = {"vocab_size": 50, "embed_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 96}
BUILDERS = pytest.mark.parametrize("builder", [llada, dream])


def build(builder: object = llada, **sizes: int) -> MaskedDiffusionLM:
    torch.manual_seed(0)
    return builder(**SIZES | sizes, max_seq_len=32).eval()


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spread", [0.0, 3.0])
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


def test_bf16_results_are_those_of_the_plain_implementation_rounded_once() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(48, 32, bias=False).bfloat16()
    x = torch.randn(5, 48).bfloat16()
    expected = plain_linear(x, layer.weight.detach(), None)
    found = use_float8(nn.Sequential(layer), emulate=True)(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)


@BUILDERS
def test_queries_keys_and_feed_forward_are_converted_and_nothing_else(builder: object) -> None:
    backbone, plain = build(builder).backbone, build(builder).backbone
    assert use_float8(backbone, emulate=True) is backbone
    for (name, module), (expected_name, expected) in zip(backbone.named_modules(), plain.named_modules(), strict=True):
        converted = name.endswith(("q_proj", "k_proj", "w1", "w2", "w3"))
        assert name == expected_name
        assert type(module) is (Float8Linear if converted else type(expected))
    assert sum(isinstance(module, Float8Linear) for module in backbone.modules()) == 2 * 5


@BUILDERS
def test_parameters_stay_the_same_under_the_same_names(builder: object) -> None:
    backbone = build(builder).backbone
    before = backbone.state_dict(keep_vars=True)
    use_float8(backbone, emulate=True)
    after = backbone.state_dict(keep_vars=True)
    assert [*after] == [*before]
    assert all(after[name] is before[name] for name in before)


@BUILDERS
def test_the_backbone_computes_nearly_the_same(builder: object) -> None:
    tokens = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = build(builder).backbone(tokens)
        found = use_float8(build(builder).backbone, emulate=True)(tokens)
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


@pytest.mark.parametrize(
    ("sizes", "name", "inputs", "outputs"),
    [
        ({"embed_dim": 40, "num_heads": 4, "num_kv_heads": 4}, "layers.0.attn.q_proj", 40, 40),
        ({"num_heads": 8, "num_kv_heads": 1}, "layers.0.attn.k_proj", 64, 8),
        ({"mlp_dim": 100}, "layers.0.mlp.w1", 64, 100),
    ],
)
def test_other_widths_are_refused(sizes: dict[str, int], name: str, inputs: int, outputs: int) -> None:
    backbone = build(**sizes).backbone
    with pytest.raises(
        ConfigError, match=rf"{name} has {inputs} inputs and {outputs} outputs.*multiples of 16"
    ) as info:
        use_float8(backbone, emulate=True)
    assert "set float8: false" in str(info.value)
    assert not any(isinstance(module, Float8Linear) for module in backbone.modules())


@pytest.mark.parametrize(("inputs", "outputs"), [(24, 32), (32, 24)])
def test_both_widths_of_a_layer_count(inputs: int, outputs: int) -> None:
    with pytest.raises(ConfigError, match=f"but out has {inputs} inputs and {outputs} outputs"):
        use_float8(nn.ModuleDict({"out": nn.Linear(inputs, outputs)}), emulate=True)


def test_it_is_captured_whole_by_the_compiler() -> None:
    layer = use_float8(nn.Sequential(nn.Linear(64, 32)), emulate=True)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), layer(x))


def test_products_of_autocast_give_bf16_from_fp32_weights() -> None:
    """In one process weights stay fp32, inputs of the layers are bf16, and autocast is on."""
    torch.manual_seed(0)
    layer = nn.Linear(48, 32, bias=False)
    x = torch.randn(5, 48).bfloat16()
    expected = plain_linear(x, layer.weight.detach(), None)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = use_float8(nn.Sequential(layer), emulate=True)(x)
    assert found.dtype == torch.bfloat16 and layer.weight.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)


@BUILDERS
def test_the_export_of_a_converted_backbone_is_that_of_the_plain_one(builder: object, tmp_path: Path) -> None:
    """As the recipe exports its target encoder: the trained head with the averaged backbone."""
    online = build(builder)
    with torch.device("meta"):
        backbone = use_float8(builder(**SIZES, max_seq_len=32).backbone, emulate=True)
    encoder = EMATargetEncoder(backbone.to_empty(device="cpu"), ema_decay=0.996)
    encoder.copy_from(online.backbone)
    weights = online.state_dict() | {f"backbone.{name}": weight for name, weight in encoder.tensors().items()}
    save_hf(online, tmp_path / "hf", None, torch.float32, weights=weights.items())
    loaded = load_hf(tmp_path / "hf").state_dict()
    assert loaded.keys() == online.state_dict().keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in online.state_dict().items())


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
