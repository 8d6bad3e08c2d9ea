"""Published LLaDA architectures, one row of numbers each."""

from functools import partial
from typing import Any

from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM
from dllm_jepa.models.llada._component_builders import llada, lora_llada

SIZES: dict[str, dict[str, Any]] = {
    "llada_8b": {
        "vocab_size": 126_464,
        "embed_dim": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "mlp_dim": 12_288,
        "max_seq_len": 4096,
        "rope_base": 500_000.0,
        "norm_eps": 1e-5,
    },
}


def llada_8b() -> MaskedDiffusionLM:
    """LLaDA-8B (Base, Instruct and 1.5 share it): 8,015,581,184 parameters."""
    return llada(**SIZES["llada_8b"])


def lora_llada_8b(
    *,
    lora_attn_modules: list[str],
    apply_lora_to_mlp: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
) -> MaskedDiffusionLM:
    """LLaDA-8B, frozen, with adapters.

    Args:
        lora_attn_modules: projections of the attention with an adapter: q_proj, k_proj, v_proj, output_proj.
        apply_lora_to_mlp: adapters on the feed-forward layers, too.
        lora_rank: rank of the adapters.
        lora_alpha: their output is scaled by lora_alpha / lora_rank.
        lora_dropout: share of their inputs that is dropped, in [0, 1).
        use_dora: learn the norms of the rows of each weight besides.
        quantize_base: keep the frozen linear layers in NF4.

    Raises:
        ValueError: if an argument is out of range.
    """
    return lora_llada(
        lora_attn_modules=lora_attn_modules,
        apply_lora_to_mlp=apply_lora_to_mlp,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        quantize_base=quantize_base,
        **SIZES["llada_8b"],
    )


qlora_llada_8b = partial(lora_llada_8b, quantize_base=True)
"""LLaDA-8B with its frozen linear layers in NF4, with adapters."""
