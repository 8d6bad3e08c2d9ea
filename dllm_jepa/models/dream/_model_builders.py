"""Published Dream architectures, one row of numbers each."""

from functools import partial
from typing import Any

from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM
from dllm_jepa.models.dream._component_builders import dream, lora_dream

SIZES: dict[str, dict[str, Any]] = {
    "dream_7b": {
        "vocab_size": 152_064,
        "embed_dim": 3584,
        "num_layers": 28,
        "num_heads": 28,
        "num_kv_heads": 4,
        "mlp_dim": 18_944,
        "max_seq_len": 2048,
        "rope_base": 1_000_000.0,
        "norm_eps": 1e-6,
    },
}


def dream_7b() -> MaskedDiffusionLM:
    """Dream-7B (Base and Instruct; also Dream-Coder and DiffuCoder): 7,615,616,512 parameters."""
    return dream(**SIZES["dream_7b"])


def lora_dream_7b(
    *,
    lora_attn_modules: list[str],
    apply_lora_to_mlp: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16.0,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
) -> MaskedDiffusionLM:
    """Dream-7B, frozen, with adapters.

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
    return lora_dream(
        lora_attn_modules=lora_attn_modules,
        apply_lora_to_mlp=apply_lora_to_mlp,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        quantize_base=quantize_base,
        **SIZES["dream_7b"],
    )


qlora_dream_7b = partial(lora_dream_7b, quantize_base=True)
"""Dream-7B with its frozen linear layers in NF4, with adapters."""
