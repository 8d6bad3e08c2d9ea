"""What a model is built from: the sizes of its transformer, and the settings of its adapters."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""The types of weights and computation, by the names that configs have for them."""

ATTN_MODULES = ("q_proj", "k_proj", "v_proj", "output_proj")
MLP_MODULES = ("w1", "w2", "w3")


@dataclass(frozen=True)
class TransformerSizes:
    """Numbers that fix an architecture.

    Args:
        vocab_size: rows of the embedding, ids without a token included.
        embed_dim: hidden size D.
        num_layers: transformer layers.
        num_heads: query heads.
        num_kv_heads: key/value heads; a divisor of `num_heads`.
        mlp_dim: width of the feed-forward layer.
        max_seq_len: longest sequence in tokens.
        rope_base: base of the rotary frequencies.
        norm_eps: epsilon of the RMSNorms.
        tie_embeddings: the head reuses the embedding.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    max_seq_len: int
    rope_base: float
    norm_eps: float
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        """Raise a ValueError that names the sizes that do not fit each other."""
        for name in ("vocab_size", "embed_dim", "num_layers", "num_heads", "num_kv_heads", "mlp_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.embed_dim % self.num_heads or (self.embed_dim // self.num_heads) % 2:
            raise ValueError(
                f"embed_dim ({self.embed_dim}) must be an even multiple of num_heads ({self.num_heads}): "
                "rotary embeddings rotate pairs"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")


@dataclass(frozen=True)
class LoRASettings:
    """What the adapters of a model are like.

    Args:
        attn_modules: projections of the attention that get an adapter, of `ATTN_MODULES`.
        apply_to_mlp: whether the three layers of the feed-forward get one, too.
        rank: r.
        alpha: the product B A is scaled by alpha / r.
        dropout: share of the inputs of an adapter that is dropped, in [0, 1).
        use_dora: learn the norms of the rows of each weight besides (DoRA).
        quantize_base: keep the frozen linear layers in NF4 (QLoRA).
    """

    attn_modules: Sequence[str]
    apply_to_mlp: bool
    rank: int
    alpha: float
    dropout: float = 0.0
    use_dora: bool = False
    quantize_base: bool = False

    def __post_init__(self) -> None:
        """Raise a ValueError that names the argument of the builders, the value and what is allowed."""
        object.__setattr__(self, "attn_modules", tuple(self.attn_modules))  # yaml and JSON give lists
        if wrong := [name for name in self.attn_modules if name not in ATTN_MODULES]:
            raise ValueError(f"lora_attn_modules: no module {', '.join(wrong)}; there are {', '.join(ATTN_MODULES)}")
        if len(set(self.attn_modules)) != len(self.attn_modules):
            raise ValueError(f"lora_attn_modules names a module twice: {', '.join(self.attn_modules)}")
        if not self.attn_modules and not self.apply_to_mlp:
            raise ValueError(
                f"no adapters: give lora_attn_modules some of {', '.join(ATTN_MODULES)}, or set apply_lora_to_mlp: true"
            )
        if self.rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:  # nor nan
            raise ValueError(f"lora_alpha must be above 0 and finite, got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.dropout}")

    @property
    def scaling(self) -> float:
        """What the product B A is multiplied by."""
        return self.alpha / self.rank

    def module_names(self) -> tuple[str, ...]:
        """The linear layers of a transformer layer that get an adapter, as `attn.q_proj`."""
        mlp = MLP_MODULES if self.apply_to_mlp else ()
        return (*(f"attn.{name}" for name in self.attn_modules), *(f"mlp.{name}" for name in mlp))
