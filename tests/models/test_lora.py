"""Adapters against their closed form in fp64, merged weights, and 4-bit bases against NF4's own values."""

import copy
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

from dllm_jepa.models import (
    LoRASettings,
    LoRAWeights,
    MaskedDiffusionLM,
    adapted_modules,
    add_lora,
    init_rope,
    is_adapter,
    load_hf,
    merged_weights,
    save_merged,
)
from dllm_jepa.models.dream import dream, dream_7b, lora_dream, lora_dream_7b, qlora_dream_7b
from dllm_jepa.models.llada import llada, llada_8b, lora_llada, lora_llada_8b, qlora_llada_8b
from dllm_jepa.training import materialize

SIZES = {"vocab_size": 48, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 48}
WIDE = SIZES | {"embed_dim": 256, "mlp_dim": 256}
BUILDERS: dict[str, Any] = {"llada": (llada, lora_llada), "dream": (dream, lora_dream)}
ATTN = ["q_proj", "k_proj", "v_proj", "output_proj"]
ALL: dict[str, Any] = {"lora_attn_modules": ATTN, "apply_lora_to_mlp": True, "lora_rank": 4, "lora_alpha": 6.0}
SCALING = 1.5
FEATURES = {  # (outputs, inputs) for SIZES
    "attn.q_proj": (32, 32),
    "attn.k_proj": (16, 32),
    "attn.v_proj": (16, 32),
    "attn.output_proj": (32, 32),
    "mlp.w1": (48, 32),
    "mlp.w2": (32, 48),
    "mlp.w3": (48, 32),
}
TOKENS = torch.randint(0, 48, (3, 9), generator=torch.Generator().manual_seed(1))

families = pytest.mark.parametrize("family", ["llada", "dream"])
kinds = pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])


class Weights:
    """The weights of a plain model, as a source."""

    def __init__(self, model: MaskedDiffusionLM) -> None:
        self.state = {name: weight.clone() for name, weight in model.state_dict().items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        return self.state[name] if rows is None else self.state[name][rows]


def plain_model(family: str, sizes: dict[str, int] = SIZES) -> MaskedDiffusionLM:
    """No weight is 0 or 1: biases and scales of norms are random, too."""
    torch.manual_seed(0)
    model: MaskedDiffusionLM = BUILDERS[family][0](**sizes)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.normal_(std=0.1).add_(name.endswith("scale"))
    return model.eval()


def adapted_model(
    family: str,
    plain: MaskedDiffusionLM,
    sizes: dict[str, int] = SIZES,
    seed: int = 0,
    frozen_dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> MaskedDiffusionLM:
    """Built on the meta device and filled, as the recipe does; adapters are in fp32."""
    with torch.device("meta"):
        model: MaskedDiffusionLM = BUILDERS[family][1](**sizes, **(ALL | settings))
    source = LoRAWeights(model, Weights(plain), seed=seed, dtype=frozen_dtype)
    device = torch.device("cpu")
    materialize(model, source.read, dtype=torch.float32, frozen_dtype=frozen_dtype, device=device)
    init_rope(model)
    return model.eval()


def randomize(model: MaskedDiffusionLM) -> dict[str, Tensor]:
    """Adapters as after training; returns copies."""
    generator = torch.Generator().manual_seed(2)
    adapters = {name: param for name, param in model.named_parameters() if is_adapter(name)}
    with torch.no_grad():
        for name, param in adapters.items():
            noise = torch.empty_like(param).uniform_(-0.5, 0.5, generator=generator)
            param.copy_(param * (1 + noise) if name.endswith("magnitude") else 0.4 * noise)
    return {name: param.detach().clone() for name, param in adapters.items()}


def merged_by_hand(base: dict[str, Tensor], adapters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The merged weights in fp64."""
    merged = {}
    for name in (name.removesuffix(".lora_a.weight") for name in adapters if name.endswith(".lora_a.weight")):
        weight = base[f"{name}.weight"].double()
        weight = (
            weight + SCALING * adapters[f"{name}.lora_b.weight"].double() @ adapters[f"{name}.lora_a.weight"].double()
        )
        if f"{name}.magnitude" in adapters:
            lengths = weight.pow(2).sum(1).sqrt()
            weight = weight / lengths[:, None] * adapters[f"{name}.magnitude"].double()[:, None]
        merged[f"{name}.weight"] = weight
    return merged


def with_weights(plain: MaskedDiffusionLM, weights: dict[str, Tensor]) -> MaskedDiffusionLM:
    model = copy.deepcopy(plain)
    model.load_state_dict(weights, strict=False)
    return model


@families
@kinds
@pytest.mark.parametrize(("attn", "mlp"), [(ATTN, True), (["q_proj", "v_proj"], False), ([], True)])
def test_the_adapters_alone_are_trained(family: str, use_dora: bool, attn: list[str], mlp: bool) -> None:
    plain = plain_model(family)
    model = adapted_model(family, plain, lora_attn_modules=attn, apply_lora_to_mlp=mlp, use_dora=use_dora)
    modules = [f"attn.{name}" for name in attn] + [f"mlp.w{number}" for number in (1, 2, 3) if mlp]
    expected = {}
    for module in (f"backbone.layers.{layer}.{name}" for layer in range(2) for name in modules):
        outputs, inputs = FEATURES[module.split(".", 3)[3]]
        expected[f"{module}.lora_a.weight"] = (4, inputs)
        expected[f"{module}.lora_b.weight"] = (outputs, 4)
        if use_dora:
            expected[f"{module}.magnitude"] = (outputs,)
    assert {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad} == expected
    assert {name for name, _ in model.named_parameters() if is_adapter(name)} == expected.keys()
    assert {name for name, _ in model.named_parameters()} - expected.keys() == plain.state_dict().keys()
    assert [*adapted_modules(model)] == [f"backbone.layers.{layer}.{name}" for layer in range(2) for name in modules]
    randomize(model)
    model.token_logits(TOKENS).logsumexp(-1).sum().backward()
    with_gradient = {name for name, param in model.named_parameters() if param.grad is not None and param.grad.any()}
    assert with_gradient == expected.keys()


def test_the_weights_of_a_built_model_are_kept() -> None:
    model = plain_model("dream")
    before = dict(model.named_parameters())
    assert add_lora(model, LoRASettings(("q_proj",), True, 2, 4.0)) is model
    after = dict(model.named_parameters())
    assert all(after[name] is param for name, param in before.items())
    assert len(after) == len(before) + 2 * 2 * 4


@families
@kinds
@torch.no_grad()
def test_new_adapters_change_no_bit(family: str, use_dora: bool) -> None:
    plain = plain_model(family)
    model = adapted_model(family, plain, use_dora=use_dora, lora_dropout=0.5)
    expected = plain.token_logits(TOKENS)
    assert torch.equal(model.token_logits(TOKENS), expected)
    assert torch.equal(model.train().token_logits(TOKENS), expected)
    randomize(model)
    assert (model.eval().token_logits(TOKENS) - expected).abs().max() > 0.05


def test_the_first_adapters() -> None:
    family, plain = "dream", plain_model("dream")
    model = adapted_model(family, plain, use_dora=True)
    params = dict(model.named_parameters())
    for name in adapted_modules(model):
        lora_a, lora_b = params[f"{name}.lora_a.weight"], params[f"{name}.lora_b.weight"]
        bound = 1 / math.sqrt(lora_a.size(1))
        assert 0.9 * bound < lora_a.abs().max() <= bound
        assert lora_a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.2)
        assert not lora_b.any()
        lengths = params[f"{name}.weight"].double().pow(2).sum(1).sqrt()
        torch.testing.assert_close(params[f"{name}.magnitude"].double(), lengths, atol=0, rtol=1e-6)
    # They depend on the seed and their names, not on what else there is.
    other = dict(adapted_model(family, plain, lora_attn_modules=["v_proj"], apply_lora_to_mlp=False).named_parameters())
    reseeded = dict(adapted_model(family, plain, use_dora=True, seed=1).named_parameters())
    first = [name for name in params if name.endswith("lora_a.weight")]
    assert sum(name in other for name in first) == 2
    assert all(torch.equal(other[name], params[name]) for name in first if name in other)
    assert not any(torch.equal(reseeded[name], params[name]) for name in first)
    values = [params[name] for name in first if params[name].shape == (4, 32)]
    assert len({tuple(value.flatten().tolist()) for value in values}) == len(values) == 12


@pytest.mark.parametrize("quantize_base", [False, True])
def test_a_rank_reads_its_rows_of_the_same_adapters(quantize_base: bool) -> None:
    family = "llada"
    with torch.device("meta"):
        model = BUILDERS[family][1](**WIDE, **ALL, use_dora=True, quantize_base=quantize_base)
    source = LoRAWeights(model, Weights(plain_model(family, WIDE)), seed=0, dtype=torch.float32)
    for name in (name for name, _ in model.named_parameters() if is_adapter(name)):
        whole = source.read(name)
        bounds = [0, len(whole) // 3, len(whole) // 2, len(whole)]
        parts = [source.read(name, slice(*pair)) for pair in zip(bounds, bounds[1:], strict=False)]
        assert torch.equal(torch.cat(parts), whole)


@families
@kinds
@torch.no_grad()
def test_adapters_equal_their_closed_form(family: str, use_dora: bool) -> None:
    plain = plain_model(family)
    model = adapted_model(family, plain, use_dora=use_dora)
    merged = merged_by_hand(plain.state_dict(), randomize(model))
    # In fp64, where processors do not differ; what is left is the fp32 in which the merged weights are stored.
    logits = model.double().token_logits(TOKENS)
    torch.testing.assert_close(logits, with_weights(plain, merged).double().token_logits(TOKENS), atol=1e-6, rtol=0)
    assert len(merged) == 14
    for name, weight in merged.items():
        linear = model.get_submodule(name.removesuffix(".weight"))
        inputs = torch.randn(5, weight.size(1), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        bias = None if linear.bias is None else linear.bias
        assert (bias is not None) == (family == "dream" and name.split(".")[-2][0] in "qkv")
        torch.testing.assert_close(linear(inputs), F.linear(inputs, weight, bias), atol=1e-12, rtol=1e-12)


@families
@kinds
def test_gradients_equal_those_of_the_closed_form(family: str, use_dora: bool) -> None:
    """Of one biased layer, in fp64; DoRA takes the norms for constants."""
    model = adapted_model(family, plain_model(family), use_dora=use_dora)
    randomize(model)
    linear = model.double().get_submodule("backbone.layers.0.attn.k_proj")
    names = ["lora_a.weight", "lora_b.weight"] + ["magnitude"] * use_dora
    inputs = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    mine = torch.autograd.grad(linear(inputs).pow(2).sum(), [linear.get_parameter(name) for name in names])
    leaves = [linear.get_parameter(name).detach().clone().requires_grad_() for name in names]
    weight = linear.get_parameter("weight") + SCALING * leaves[1] @ leaves[0]
    if use_dora:
        weight = weight * (leaves[2] / weight.detach().pow(2).sum(1).sqrt())[:, None]
    expected = torch.autograd.grad(F.linear(inputs, weight, linear.bias).pow(2).sum(), leaves)
    for ours, theirs in zip(mine, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


@kinds
@pytest.mark.parametrize(("family", "dtype"), [("llada", torch.float32), ("dream", torch.bfloat16)], ids=str)
def test_merging_touches_neither_the_base_nor_the_adapters(family: str, use_dora: bool, dtype: torch.dtype) -> None:
    plain = plain_model(family).to(dtype)
    model = adapted_model(family, plain, use_dora=use_dora)
    adapters, base = randomize(model), Weights(plain)
    before = {name: tensor.clone() for name, tensor in (base.state | adapters).items()}
    assert model.lora is not None
    merged = dict(merged_weights(plain.state_dict(), base.read, adapters, model.lora))
    assert [*merged] == [*plain.state_dict()]
    expected = merged_by_hand(base.state, adapters)
    for name, weight in merged.items():
        if name in expected:
            assert weight.dtype == torch.float32
            torch.testing.assert_close(weight.double(), expected[name], atol=1e-6, rtol=1e-6)
            weight.zero_()  # not a view of anything
        else:
            assert weight is base.state[name]
    assert all(torch.equal(tensor, before[name]) for name, tensor in (base.state | adapters).items())


@kinds
@torch.no_grad()
def test_every_adapter_drops_inputs_in_training_only(use_dora: bool) -> None:
    model = adapted_model("llada", plain_model("llada"), use_dora=use_dora, lora_dropout=0.5)
    randomize(model)
    for name in adapted_modules(model):
        linear = model.get_submodule(name)
        inputs = torch.randn(5, linear.get_parameter("weight").size(1), generator=torch.Generator().manual_seed(3))
        in_training = linear.train()(inputs)
        assert not torch.allclose(in_training, linear(inputs), atol=1e-3)
        assert torch.equal(linear.eval()(inputs), linear(inputs))


@families
@kinds
@torch.no_grad()
def test_a_merged_model_on_disk_computes_the_same(family: str, use_dora: bool, tmp_path: Path) -> None:
    plain = plain_model(family)
    model = adapted_model(family, plain, use_dora=use_dora, lora_dropout=0.5)
    adapters = randomize(model)
    expected = model.token_logits(TOKENS)
    assert not torch.allclose(model.train().token_logits(TOKENS), expected, atol=1e-2), "no dropout"
    save_merged(model, tmp_path / "out", Weights(plain).read, adapters, like=None, dtype=torch.float32)
    loaded = load_hf(tmp_path / "out")
    assert loaded.lora is None and loaded.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(loaded.token_logits(TOKENS), expected, atol=2e-6, rtol=0)
    assert torch.equal(model.eval().token_logits(TOKENS), expected)


def dequantized(plain: MaskedDiffusionLM) -> dict[str, Tensor]:
    """What NF4 makes of every linear layer of the transformer."""
    linears = [name for name in plain.state_dict() if ".layers." in name and name.endswith("weight")]
    assert len(linears) == 14
    return {name: to_nf4(plain.state_dict()[name]).get_original_weight() for name in linears}


@families
@kinds
@pytest.mark.parametrize("attn", [ATTN, ["q_proj"]], ids=len)
@torch.no_grad()
def test_a_quantized_base_computes_with_nf4_s_values(family: str, use_dora: bool, attn: list[str]) -> None:
    plain = plain_model(family, WIDE)
    settings = {"lora_attn_modules": attn, "apply_lora_to_mlp": len(attn) > 1, "use_dora": use_dora}
    model = adapted_model(family, plain, WIDE, quantize_base=True, **settings)
    values = dequantized(plain)
    reference = with_weights(plain, values)
    logits = model.token_logits(TOKENS)
    torch.testing.assert_close(logits, reference.token_logits(TOKENS), atol=1e-5, rtol=1e-5)
    assert (logits - plain.token_logits(TOKENS)).abs().max() > 1e-3
    for name, param in model.named_parameters():
        assert isinstance(param.data, NF4Tensor) == (name in values), name
        if name in values:
            exact = plain.state_dict()[name]
            assert 0.02 < (param.data.get_original_weight() - exact).norm() / exact.norm() < 0.12
    # With trained adapters, too: DoRA's directions are those of the quantized weights.
    merged = merged_by_hand(values, randomize(model))
    expected = with_weights(reference, merged).double().token_logits(TOKENS)  # the rounding of one side only
    torch.testing.assert_close(model.token_logits(TOKENS).double(), expected, atol=1e-5, rtol=1e-5)


@kinds
def test_a_quantized_model_is_merged_into_the_original_weights(use_dora: bool, tmp_path: Path) -> None:
    family = "dream"
    plain = plain_model(family, WIDE)
    model = adapted_model(family, plain, WIDE, quantize_base=True, use_dora=use_dora)
    adapters = randomize(model)
    save_merged(model, tmp_path / "out", Weights(plain).read, adapters, like=None, dtype=torch.float32)
    weights = load_hf(tmp_path / "out").state_dict()
    rounded = merged_by_hand(dequantized(plain), adapters)
    for name, expected in merged_by_hand(plain.state_dict(), adapters).items():
        torch.testing.assert_close(weights[name].double(), expected, atol=2e-6, rtol=1e-5)
        assert (weights[name] - rounded[name]).abs().max() > 1e-3
    assert all(torch.equal(weights[name], exact) for name, exact in plain.state_dict().items() if name not in rounded)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_attn_modules": ["q_proj", "o_proj", "wq"]},
            r"lora_attn_modules: no module o_proj, wq; there are q_proj, k_proj, v_proj, output_proj$",
        ),
        ({"lora_attn_modules": ["q_proj", "q_proj"]}, "lora_attn_modules names a module twice: q_proj, q_proj"),
        (
            {"lora_attn_modules": [], "apply_lora_to_mlp": False},
            "no adapters: give lora_attn_modules some of q_proj, k_proj, v_proj, output_proj, or set apply_lora_to_mlp",
        ),
        ({"lora_rank": 0}, "lora_rank must be at least 1, got 0"),
        ({"lora_alpha": 0.0}, r"lora_alpha must be above 0 and finite, got 0\.0"),
        ({"lora_alpha": math.nan}, "lora_alpha must be above 0 and finite, got nan"),
        ({"lora_alpha": math.inf}, "lora_alpha must be above 0 and finite, got inf"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1\.0"),
        ({"lora_dropout": -0.1}, r"lora_dropout must be in \[0, 1\), got -0\.1"),
        (
            {"quantize_base": True},
            r"quantize_base: layer 0 has 1024 weights in attn\.q_proj, and NF4 needs a multiple of 16384; set quantize",
        ),
        ({"quantize_base": True, "embed_dim": 256}, r"quantize_base: layer 0 has 12288 weights in mlp\.w1"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_llada(**(SIZES | ALL | changes))


@families
@kinds
@pytest.mark.parametrize("attn", [["k_proj"], ATTN])
def test_a_bf16_base_computes_in_bf16_throughout(family: str, use_dora: bool, attn: list[str]) -> None:
    """Packed attention takes its half-precision kernel only for bf16, and only if q, k and v agree."""
    settings: dict[str, Any] = {"use_dora": use_dora, "lora_attn_modules": attn}
    model = adapted_model(family, plain_model(family), frozen_dtype=torch.bfloat16, **settings)
    found: set[torch.dtype] = set()
    for layer in model.backbone.layers:
        for name in FEATURES:
            layer.get_submodule(name).register_forward_hook(lambda _, __, out: found.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(TOKENS)
    assert found == {torch.bfloat16} == {hidden.dtype}


@families
@kinds
def test_fresh_adapters_merge_to_their_base_in_bf16_too(family: str, use_dora: bool) -> None:
    """Norms of rows are never rounded: a DoRA that has learned nothing changes nothing."""
    model = adapted_model(family, plain_model(family), frozen_dtype=torch.bfloat16, use_dora=use_dora)
    assert model.lora is not None
    state = model.state_dict()
    adapters = {name: state.pop(name) for name in [*state] if is_adapter(name)}
    for name, weight in merged_weights(state, state.__getitem__, adapters, model.lora):
        assert torch.equal(weight.to(torch.bfloat16), state[name]), name


@pytest.mark.parametrize(
    ("plain", "lora", "qlora"),
    [(llada_8b, lora_llada_8b, qlora_llada_8b), (dream_7b, lora_dream_7b, qlora_dream_7b)],
)
def test_the_published_sizes_come_with_adapters(plain: Any, lora: Any, qlora: Any) -> None:
    with torch.device("meta"):
        model = lora(**ALL)
        expected = {name: param.shape for name, param in plain().named_parameters()}
    base = {name: param for name, param in model.named_parameters() if not is_adapter(name)}
    assert {name: param.shape for name, param in base.items()} == expected
    assert not any(param.requires_grad for param in base.values())
    # Whether they can be quantized, the tests of the packaged configs say.
    defaults = [inspect.signature(build).parameters["quantize_base"].default for build in (lora, qlora)]
    assert defaults == [False, True]
    with pytest.raises(TypeError, match="embed_dim"):
        lora(**ALL, embed_dim=32)
