"""Adapters merged into the weights of their base, one weight at a time; the model in memory stays as it is."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_jepa.models._families import FAMILIES
from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM
from dllm_jepa.models._sizes import LoRASettings
from dllm_jepa.models._tokenizer import Tokenizer
from dllm_jepa.models.files._directory import Prompt
from dllm_jepa.models.files._writer import SHARD_BYTES, save_hf

_EPSILON = 1e-12


def save_merged(
    model: MaskedDiffusionLM,
    path: str | Path,
    read: Callable[[str], Tensor],
    adapters: Mapping[str, Tensor],
    *,
    like: str | Path | None,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None = None,
    card: str | None = None,
    prompt: Prompt | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the plain model that computes what a model with adapters does; arguments and errors as of `save_hf`.

    Args:
        model: a model with adapters, on any device; it gives the family, the sizes and the settings.
        path: directory to create.
        read: see `merged_weights`.
        adapters: see `merged_weights`.
        like: see `save_hf`.
        dtype: type to store; the sums are taken in fp32.
        tokenizer: see `save_hf`.
        card: see `save_hf`.
        prompt: see `save_hf`.
        shard_bytes: see `save_hf`.
    """
    assert model.lora is not None, "the model has no adapters"
    with torch.device("meta"):
        plain = FAMILIES[model.family].build(model.sizes)
    weights = merged_weights(plain.state_dict(), read, adapters, model.lora)
    files: dict[str, Any] = {"tokenizer": tokenizer, "card": card, "prompt": prompt}
    save_hf(plain, path, like, dtype, weights=weights, shard_bytes=shard_bytes, **files)


def merged_weights(
    names: Iterable[str], read: Callable[[str], Tensor], adapters: Mapping[str, Tensor], settings: LoRASettings
) -> Iterator[tuple[str, Tensor]]:
    """The weights of the plain model that computes the same.

    Args:
        names: parameter names of the plain model, in its order.
        read: gives a weight of the base by name, as it was before it was quantized.
        adapters: full tensors of the adapters, by parameter name.
        settings: what the adapters are like.

    Yields:
        (name, weight); merged ones in fp32, the others as `read` gives them.
    """
    for name in names:
        module = name.removesuffix(".weight")
        lora_a, lora_b = (adapters.get(f"{module}.{part}.weight") for part in ("lora_a", "lora_b"))
        if lora_a is None or lora_b is None:
            yield name, read(name)
        else:
            yield name, _merge(read(name), lora_a, lora_b, adapters.get(f"{module}.magnitude"), settings.scaling)


def _merge(weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor | None, scaling: float) -> Tensor:
    """W [outputs, inputs] + scaling * B A in fp32, and for DoRA its rows brought to their magnitudes."""
    lora_a, lora_b = lora_a.to(weight.device, torch.float32), lora_b.to(weight.device, torch.float32)
    merged = torch.addmm(weight.float(), lora_b, lora_a, alpha=scaling)
    if magnitude is None:
        return merged
    norms = torch.linalg.norm(merged, dim=1).clamp(min=_EPSILON)
    rescaled: Tensor = merged * (magnitude.to(weight.device, torch.float32) / norms)[:, None]
    return rescaled
