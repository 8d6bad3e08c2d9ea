"""Published LLaDA architectures, one row of numbers each."""

from typing import Any

from dllm_jepa.models._lora import with_lora
from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM
from dllm_jepa.models.llada._component_builders import llada

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


lora_llada_8b = with_lora(llada_8b)
qlora_llada_8b = with_lora(llada_8b, quantize_base=True)
