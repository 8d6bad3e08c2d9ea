"""Dream from its numbers: biased query, key and value; token i scored from hidden state i - 1."""

from dllm_jepa.models._lora import with_lora
from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM
from dllm_jepa.models._sizes import TransformerSizes


def dream(
    *,
    vocab_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    mlp_dim: int,
    max_seq_len: int = 2048,
    rope_base: float = 1_000_000.0,
    norm_eps: float = 1e-6,
    tie_embeddings: bool = False,
) -> MaskedDiffusionLM:
    """Build a Dream model of any size.

    The arguments are those of `TransformerSizes`. Weights start as PyTorch has them.

    Raises:
        ValueError: if the sizes do not fit each other.

    Source: Dream 7B, arXiv 2508.15487.
    """
    sizes = TransformerSizes(
        vocab_size=vocab_size,
        embed_dim=embed_dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        mlp_dim=mlp_dim,
        max_seq_len=max_seq_len,
        rope_base=rope_base,
        norm_eps=norm_eps,
        tie_embeddings=tie_embeddings,
    )
    return MaskedDiffusionLM(sizes, family="Dream", shift_logits=True, attn_bias=True)


def dream_7b() -> MaskedDiffusionLM:
    """Dream-7B (Base and Instruct; also Dream-Coder and DiffuCoder): 7,615,616,512 parameters."""
    return dream(
        vocab_size=152_064,
        embed_dim=3584,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        mlp_dim=18_944,
    )


lora_dream = with_lora(dream)
lora_dream_7b = with_lora(dream_7b)
qlora_dream_7b = with_lora(dream_7b, quantize_base=True)
