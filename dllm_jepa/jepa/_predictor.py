"""Predictors: from the context embedding to a guess of the target embedding.

Shape legend: S sequences, D hidden.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, computed in fp32 with its weight, then cast back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Shape and type of `x` are kept."""
        return F.rms_norm(x.float(), self.scale.shape, self.scale, 1e-6).to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it to [..., dim]."""
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class PredictorLayer(nn.Module):
    """A pre-norm decoder layer on sequences of length one.

    Attention over one token returns that token's value whatever its query and key, so the layer has none: they would
    get gradient exactly zero.
    """

    def __init__(self, embed_dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.sa_norm = RMSNorm(embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.output_proj = nn.Linear(embed_dim, embed_dim, bias=False)
        self.mlp_norm = RMSNorm(embed_dim)
        self.mlp = FeedForward(embed_dim, mlp_dim)

    def forward(self, pooled: Tensor) -> Tensor:
        """Apply the layer to [S, D]."""
        pooled = pooled + self.output_proj(self.v_proj(self.sa_norm(pooled)))
        update: Tensor = self.mlp(self.mlp_norm(pooled))
        return pooled + update


class Predictor(nn.Module):
    """Layers over the pooled context embedding, each from [S, D] to [S, D]."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, pooled: Tensor) -> Tensor:
        """From pooled context embeddings to `pred`, both [S, D]."""
        for layer in self.layers:
            pooled = layer(pooled)
        return pooled


def transformer_predictor(embed_dim: int, mlp_dim: int, *, num_layers: Annotated[int, Ge(1), Le(5)] = 1) -> Predictor:
    """Decoder layers of the backbone's width and a final norm.

    Args:
        embed_dim: hidden size of the backbone.
        mlp_dim: width of its feed-forward layers.
        num_layers: 1 to 5.

    Source: DLLM-JEPA, arXiv 2606.00091.
    """
    if not 1 <= num_layers <= 5:
        raise ValueError(f"num_layers must be between 1 and 5, got {num_layers}")
    return Predictor([*(PredictorLayer(embed_dim, mlp_dim) for _ in range(num_layers)), RMSNorm(embed_dim)])


def mlp_predictor(embed_dim: int, mlp_dim: int) -> Predictor:
    """Two linear layers with a GELU between them, `mlp_dim` wide: an ablation."""
    return Predictor([nn.Linear(embed_dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, embed_dim)])


def identity_predictor(embed_dim: int, mlp_dim: int) -> Predictor:
    """No predictor: the context embedding itself is compared with the target. An ablation; sizes are not used."""
    del embed_dim, mlp_dim
    return Predictor([])
