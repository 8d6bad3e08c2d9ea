"""LoRA, DoRA and QLoRA as a change to a built model, and the first weights of its adapters.

Shape legend: r rank, I inputs of a linear layer.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import linear_nf4, to_nf4
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import DoRALinear, LoRALinear

from dllm_jepa.models._init import InitialWeights
from dllm_jepa.models._lora_settings import ATTN_MODULES, MLP_MODULES, LoRASettings
from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM

ADAPTER_SUFFIXES = (".lora_a.weight", ".lora_b.weight", ".magnitude")

# torchao quantizes blocks of 64 weights, and then the scales of 256 blocks.
_NF4_BLOCK = 64 * 256


class WeightSource(Protocol):
    """Gives weights by parameter name."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The weight, or some of its rows, on CPU."""
        ...


def add_lora(model: MaskedDiffusionLM, settings: LoRASettings) -> MaskedDiffusionLM:
    """Freeze a model and add adapters to its transformer layers, in place.

    Args:
        model: a model without adapters. Its weights are kept, unless they are quantized.
        settings: where, and of which kind.

    Returns:
        The model. Its parameters with a gradient are the adapters alone.

    Raises:
        ValueError: if a layer cannot be quantized.
    """
    model.requires_grad_(False)
    model.lora = settings
    adapted = settings.module_names()
    for number, layer in enumerate(model.backbone.layers):
        for name in (*(f"attn.{name}" for name in ATTN_MODULES), *(f"mlp.{name}" for name in MLP_MODULES)):
            linear = layer.get_submodule(name)
            assert isinstance(linear, nn.Linear), type(linear)
            if settings.quantize_base and linear.weight.numel() % _NF4_BLOCK:
                raise ValueError(
                    f"quantize_base: layer {number} has {linear.weight.numel()} weights in {name}, and NF4 needs a "
                    f"multiple of {_NF4_BLOCK}; set quantize_base: false, or take a wider model"
                )
            if name in adapted:
                layer.set_submodule(name, _adapted(linear, settings))
            elif settings.quantize_base:
                layer.set_submodule(name, _quantized(linear))
    return model


def with_lora(
    builder: Callable[..., MaskedDiffusionLM], *, quantize_base: bool = False
) -> Callable[..., MaskedDiffusionLM]:
    """The builder of the same model, frozen and with adapters; it takes the arguments of the adapters besides.

    Args:
        builder: a builder with keyword arguments only.
        quantize_base: default of the argument of this name.
    """

    def build(
        *,
        lora_attn_modules: list[str],
        apply_lora_to_mlp: bool = False,
        lora_rank: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        use_dora: bool = False,
        quantize_base: bool = quantize_base,
        **sizes: Any,
    ) -> MaskedDiffusionLM:
        settings = LoRASettings(
            lora_attn_modules, apply_lora_to_mlp, lora_rank, lora_alpha, lora_dropout, use_dora, quantize_base
        )
        return add_lora(builder(**sizes), settings)

    # Configs are checked against the signature: it has the arguments of both, by name.
    own = [parameter for parameter in inspect.signature(build).parameters.values() if parameter.name != "sizes"]
    signature = inspect.signature(builder)
    build.__signature__ = signature.replace(parameters=[*own, *signature.parameters.values()])  # type: ignore[attr-defined]
    build.__annotations__ = {**builder.__annotations__, **build.__annotations__}
    build.__name__ = f"lora_{builder.__name__}"
    build.__doc__ = f"{(builder.__doc__ or '').partition(chr(10))[0]} Frozen, with adapters."
    return build


def is_adapter(name: str) -> bool:
    """Whether a parameter name is that of an adapter."""
    return name.endswith(ADAPTER_SUFFIXES)


class LoRAWeights:
    """First weights of a model with adapters, read by parameter name: the base's, and adapters that change nothing.

    A is uniform in +-1/sqrt(I), B zero, and a DoRA magnitude the norm of its weight's rows as they are stored. Every
    tensor depends on (base, seed, name, shape) alone.

    Args:
        model: the model, on any device.
        base: gives the weights of the base.
        seed: seed of the run.
        dtype: type in which the base is stored.

    Source: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353.
    """

    def __init__(self, model: MaskedDiffusionLM, base: WeightSource, *, seed: int, dtype: torch.dtype) -> None:
        assert model.lora is not None, "the model has no adapters"
        self._base = base
        self._dtype = dtype
        self._is_quantized = model.lora.quantize_base
        self._adapters = InitialWeights(model, seed=seed, num_layers=model.sizes.num_layers)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The first value of a parameter, or of some of its rows, on CPU."""
        if not is_adapter(name):
            return self._base.read(name, rows)
        if not name.endswith(".magnitude"):
            return self._adapters.read(name, rows)
        of = f"{name.removesuffix('.magnitude')}.weight"
        if self._is_quantized:  # its blocks do not end with rows
            weight = to_nf4(self._base.read(of).to(self._dtype)).get_original_weight()
            weight = weight if rows is None else weight[rows]
        else:
            weight = self._base.read(of, rows).to(self._dtype)
        norms: Tensor = torch.linalg.norm(weight.float(), dim=1)  # in fp32, as in the forward and in a merge
        return norms


def adapted_modules(model: MaskedDiffusionLM) -> Iterator[str]:
    """Names of the linear layers with an adapter, in the order of the model."""
    assert model.lora is not None, "the model has no adapters"
    for number in range(model.sizes.num_layers):
        yield from (f"backbone.layers.{number}.{name}" for name in model.lora.module_names())


class _DoRALinear(DoRALinear):
    """DoRA that computes what its merged weight does, as PEFT's: torchtune's scales a bias like the rows of the weight.

    The result has the type of the base's product: fp32 magnitudes would make it fp32 under autocast, and keep it from
    the half-precision attention kernels.

    Source: https://github.com/huggingface/peft (`DoraLinearLayer`).
    """

    def forward(self, x: Tensor) -> Tensor:
        """The product with the merged weight, and the bias; shape [..., I] to [..., O]."""
        weight = self.get_parameter("weight")
        product: Tensor = linear_nf4(input=x, weight=weight) if self._quantize_base else F.linear(x, weight)
        x = self.dropout(x)
        with torch.no_grad():
            # lora_a and lora_b are called, not multiplied: autocast and FSDP know calls.
            eye = torch.eye(self.in_dim, device=x.device, dtype=x.dtype)
            merged = weight.to(x.dtype) + self.scaling * self.lora_b(self.lora_a(eye)).T
            # Half-precision norms would be off by up to 0.4 %, and a merge, which has exact ones, another model.
            norms = torch.linalg.norm(merged.to(torch.promote_types(merged.dtype, torch.float32)), dim=1)
        scale = self.magnitude / norms
        out = (product + (scale - 1) * product + scale * self.lora_b(self.lora_a(x)) * self.scaling).to(product.dtype)
        biased: Tensor = out if self.bias is None else out + self.bias
        return biased


def _adapted(linear: nn.Linear, settings: LoRASettings) -> nn.Module:
    build = _DoRALinear if settings.use_dora else LoRALinear
    with linear.weight.device:
        adapted: nn.Module = build(
            linear.in_features,
            linear.out_features,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            use_bias=linear.bias is not None,
            quantize_base=settings.quantize_base,
        )
    if not settings.quantize_base:
        adapted.register_parameter("weight", linear.get_parameter("weight"))
    if isinstance(linear.bias, nn.Parameter):
        adapted.register_parameter("bias", linear.bias)
    for name, param in adapted.named_parameters():
        param.requires_grad_(is_adapter(f".{name}"))
    if isinstance(adapted, DoRALinear) and not linear.weight.is_meta:
        adapted.initialize_dora_magnitude()  # type: ignore[no-untyped-call]
    return adapted


def _quantized(linear: nn.Linear) -> nn.Module:
    with linear.weight.device:
        quantized: nn.Module = FrozenNF4Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
    if isinstance(linear.bias, nn.Parameter):
        quantized.register_parameter("bias", linear.bias)
    return quantized.requires_grad_(False)
