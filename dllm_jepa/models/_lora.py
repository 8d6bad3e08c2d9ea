"""LoRA, DoRA and QLoRA as a change to a built model, and the first weights of its adapters.

Shape legend: r rank, I inputs and O outputs of a linear layer.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_jepa.models._init import InitialWeights
from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM
from dllm_jepa.models._sizes import ATTN_MODULES, MLP_MODULES, LoRASettings

ADAPTER_SUFFIXES = (".lora_a.weight", ".lora_b.weight", ".magnitude")

# torchao quantizes blocks of 64 weights, and then the scales of 256 blocks.
_NF4_BLOCK = 64 * 256


class WeightSource(Protocol):
    """Gives weights by parameter name."""

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The weight, or some of its rows, on CPU."""
        ...


def add_lora(model: MaskedDiffusionLM, settings: LoRASettings) -> MaskedDiffusionLM:
    """Freeze a model without adapters, add some to its transformer layers, in place, and return it.

    Its parameters are kept, but for those that are quantized; the adapters alone have gradients.

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
            if settings.quantize_base:
                _quantize(linear)
            if name in adapted:
                layer.set_submodule(name, (DoRALinear if settings.use_dora else LoRALinear)(linear, settings))
    return model


def with_lora(
    builder: Callable[..., MaskedDiffusionLM], *, quantize_base: bool = False
) -> Callable[..., MaskedDiffusionLM]:
    """The builder of the same model, frozen and with adapters; it takes the arguments of the adapters besides.

    Args:
        builder: a builder with keyword arguments only.
        quantize_base: default of the new builder's argument of this name.
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
        self._adapters = InitialWeights(model, seed=seed)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The first value of a parameter, or of some of its rows, on CPU."""
        if not is_adapter(name):
            return self._base.read(name, rows)
        if not name.endswith(".magnitude"):
            return self._adapters.read(name, rows)
        of = f"{name.removesuffix('.magnitude')}.weight"
        if self._is_quantized:  # its blocks do not end with rows
            from torchao.dtypes.nf4tensor import to_nf4

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


class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter: `W x + b + scaling * B A dropout(x)`.

    Args:
        linear: the layer, whose parameters are taken over; its weight may be in NF4.
        settings: its rank, scaling and dropout are used.

    Source: LoRA, arXiv 2106.09685.
    """

    def __init__(self, linear: nn.Linear, settings: LoRASettings) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.scaling = settings.scaling
        self.dropout = nn.Dropout(settings.dropout) if settings.dropout > 0 else nn.Identity()
        with linear.weight.device:
            self.lora_a = nn.Linear(linear.in_features, settings.rank, bias=False)
            self.lora_b = nn.Linear(settings.rank, linear.out_features, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Shape [..., I] to [..., O]."""
        out = F.linear(x, self.weight, self.bias)
        update: Tensor = self.scaling * self.lora_b(self.lora_a(self.dropout(x)))
        return out + update


class DoRALinear(LoRALinear):
    """A frozen linear layer with an adapter and trained norms of the rows of their sum; computes as PEFT's.

    The result has the type of the base's product: fp32 magnitudes would make it fp32 under autocast, and keep it from
    the half-precision attention kernels.

    Source: DoRA, arXiv 2402.09353; https://github.com/huggingface/peft (`DoraLinearLayer`).
    """

    def __init__(self, linear: nn.Linear, settings: LoRASettings) -> None:
        super().__init__(linear, settings)
        # Of a quantized weight, too, norms are those of what it computes with.
        self.magnitude = nn.Parameter(torch.linalg.norm(linear.weight.detach().to(torch.float32), dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Shape [..., I] to [..., O]."""
        product = F.linear(x, self.weight)
        x = self.dropout(x)
        with torch.no_grad():
            # lora_a and lora_b are called, not multiplied: autocast and FSDP know calls.
            eye = torch.eye(self.weight.size(1), device=x.device, dtype=x.dtype)
            merged = self.weight.to(x.dtype) + self.scaling * self.lora_b(self.lora_a(eye)).T
            # Half-precision norms would be off by up to 0.4 %, and a merge, which has exact ones, another model.
            norms = torch.linalg.norm(merged.to(torch.promote_types(merged.dtype, torch.float32)), dim=1)
        scale = self.magnitude / norms
        out: Tensor = (product + (scale - 1) * product + scale * self.lora_b(self.lora_a(x)) * self.scaling).to(
            product.dtype
        )
        return out if self.bias is None else out + self.bias


def _quantize(linear: nn.Linear) -> None:
    """Put the weight in NF4: `F.linear` of torchao's tensor multiplies by what it stands for."""
    from torchao.dtypes.nf4tensor import to_nf4  # takes longer to import than torch

    linear.weight = nn.Parameter(to_nf4(linear.weight.detach()), requires_grad=False)
