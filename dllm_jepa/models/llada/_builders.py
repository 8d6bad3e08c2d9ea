"""LLaDA from its numbers: no biases, token i scored from hidden state i."""

from dllm_jepa.models._lora import with_lora
from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM
from dllm_jepa.models._sizes import TransformerSizes


def llada(
    *,
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    mlp_dim: int,
    num_kv_heads: int | None = None,
    max_seq_len: int = 4096,
    rope_base: float = 500_000.0,
    norm_eps: float = 1e-5,
    tie_embeddings: bool = False,
) -> MaskedDiffusionLM:
    """Build a LLaDA model of any size.

    The arguments are those of `TransformerSizes`; `num_kv_heads: None` means `num_heads`. Weights start as PyTorch has
    them.

    Raises:
        ValueError: if the sizes do not fit each other.

    Source: LLaDA, arXiv 2502.09992.
    """
    sizes = TransformerSizes(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if num_kv_heads is None else num_kv_heads,
        mlp_dim=mlp_dim,
        max_seq_len=max_seq_len,
        rope_base=rope_base,
        norm_eps=norm_eps,
        tie_embeddings=tie_embeddings,
    )
    return MaskedDiffusionLM(sizes, family="llada", shift_logits=False, attn_bias=False)


def llada_8b() -> MaskedDiffusionLM:
    """LLaDA-8B (Base, Instruct and 1.5 share it): 8,015,581,184 parameters."""
    return llada(
        vocab_size=126_464,
        embed_dim=4096,
        num_layers=32,
        num_heads=32,
        mlp_dim=12_288,
    )


lora_llada = with_lora(llada)
lora_llada_8b = with_lora(llada_8b)
qlora_llada_8b = with_lora(llada_8b, quantize_base=True)
