"""Adapters merged into the weights of their base, one weight at a time; the model in memory stays as it is.

Shape legend: r rank, I inputs and O outputs of a linear layer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

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
    """Write the plain model that computes what a model with adapters does; see `save_hf`.

    Args:
        model: a model with adapters, on any device; it gives the family, the sizes and the settings.
        path: directory to create.
        read: gives a weight of the base by name, as it was before it was quantized.
        adapters: full tensors of the adapters, by parameter name.
        like: see `save_hf`.
        dtype: type to store; the sums are taken in fp32.
        tokenizer: see `save_hf`.
        card: see `save_hf`.
        prompt: see `save_hf`.
        shard_bytes: see `save_hf`.

    Raises:
        CheckpointError: see `save_hf`.
    """
    assert model.lora is not None, "the model has no adapters"
    with torch.device("meta"):
        plain = FAMILIES[model.family].build(model.sizes)
    weights = merged_weights(plain.state_dict(), read, adapters, model.lora)
    save_hf(
        plain,
        path,
        like,
        dtype,
        weights=weights,
        tokenizer=tokenizer,
        card=card,
        prompt=prompt,
        shard_bytes=shard_bytes,
    )


def merged_weights(
    names: Iterable[str], read: Callable[[str], Tensor], adapters: Mapping[str, Tensor], settings: LoRASettings
) -> Iterator[tuple[str, Tensor]]:
    """The weights of the plain model that computes the same.

    Args:
        names: parameter names of the plain model, in its order.
        read: gives a weight of the base, as it was before it was quantized.
        adapters: full tensors of the adapters, by parameter name.
        settings: what the adapters are like.

    Yields:
        (name, weight); merged ones in fp32, the others as `read` gives them.
    """
    for name in names:
        module = name.removesuffix(".weight")
        if f"{module}.lora_a.weight" not in adapters:
            yield name, read(name)
            continue
        yield (
            name,
            merged_weight(
                read(name),
                adapters[f"{module}.lora_a.weight"],
                adapters[f"{module}.lora_b.weight"],
                adapters.get(f"{module}.magnitude"),
                settings.scaling,
            ),
        )


def merged_weight(weight: Tensor, lora_a: Tensor, lora_b: Tensor, magnitude: Tensor | None, scaling: float) -> Tensor:
    """One weight of the base with its adapter: W + scaling * B A, and for DoRA its rows brought to their magnitudes.

    Args:
        weight: [O, I].
        lora_a: [r, I].
        lora_b: [O, r].
        magnitude: [O], or None without DoRA.
        scaling: alpha / r.

    Returns:
        fp32 [O, I].
    """
    lora_a, lora_b = lora_a.to(weight.device, torch.float32), lora_b.to(weight.device, torch.float32)
    merged = torch.addmm(weight.float(), lora_b, lora_a, alpha=scaling)
    if magnitude is None:
        return merged
    norms = torch.linalg.norm(merged, dim=1).clamp(min=_EPSILON)
    rescaled: Tensor = merged * (magnitude.to(weight.device, torch.float32) / norms)[:, None]
    return rescaled
