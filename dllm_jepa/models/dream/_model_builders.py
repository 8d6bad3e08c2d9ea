"""Published Dream architectures, one row of numbers each."""

from typing import Any

from dllm_jepa.models._lora import with_lora
from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM
from dllm_jepa.models.dream._component_builders import dream

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


lora_dream_7b = with_lora(dream_7b)
qlora_dream_7b = with_lora(dream_7b, quantize_base=True)
