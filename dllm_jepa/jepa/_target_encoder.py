"""The slowly moving copy of the backbone that embeds the target view.

Shape legend: B rows, T tokens of a row, D hidden, S sequences.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dllm_jepa.jepa._pooling import pool


class EMATargetEncoder:
    """Exponential moving average of the online backbone, in fp32.

    In bf16 with round-to-nearest, updates of 0.4 % of the distance are lost, and the target would stay the base model.

    Args:
        backbone: a module with the online backbone's parameters and sharding, in fp32. It is owned by the encoder,
            frozen and put into evaluation mode.
        ema_decay: tau in [0, 1): the share of the old average that an update keeps.

    Raises:
        ValueError: if `ema_decay` is out of range or a parameter is not fp32.
    """

    def __init__(self, backbone: nn.Module, *, ema_decay: float) -> None:
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        if wrong := {str(param.dtype) for param in backbone.parameters() if param.dtype != torch.float32}:
            raise ValueError(
                f"the target encoder is kept in fp32, got parameters of {', '.join(sorted(wrong))}: in bf16 its "
                "updates are rounded away"
            )
        self.backbone = backbone.requires_grad_(False).eval()
        self.ema_decay = ema_decay

    @torch.no_grad()
    def copy_from(self, online_backbone: nn.Module) -> None:
        """Start the average at the online weights."""
        for average, online in zip(self.backbone.parameters(), online_backbone.parameters(), strict=True):
            average.copy_(online)

    @torch.no_grad()
    def embed(
        self, tokens: Tensor, sequence_ids: Tensor, num_sequences: int, *, layer_norm: bool = True, **packing: Any
    ) -> Tensor:
        """Embed the target view; no gradient, no head.

        Args:
            tokens: int64 [B, T], target view.
            sequence_ids: int64 [B, T], see `pool`.
            num_sequences: S.
            layer_norm: see `pool`.
            **packing: `mask` and `input_pos` of the backbone.

        Returns:
            fp32 [S, D].
        """
        return pool(self.backbone(tokens, **packing), sequence_ids, num_sequences, layer_norm=layer_norm)

    @torch.no_grad()
    def update(self, online_backbone: nn.Module) -> None:
        """Move towards the online weights: average <- tau * average + (1 - tau) * online. Call after the optimizer."""
        averages: list[Tensor] = list(self.backbone.parameters())
        online: list[Tensor] = list(online_backbone.parameters())
        if all(param.dtype == torch.float32 for param in online):
            torch._foreach_lerp_(averages, online, 1 - self.ema_decay)
            return
        for average, param in zip(averages, online, strict=True):  # never a second fp32 copy of the whole model
            average.lerp_(param.float(), 1 - self.ema_decay)

    def tensors(self) -> dict[str, Tensor]:
        """The average, live: to be saved, or loaded in place."""
        return self.backbone.state_dict()


def ema_target_encoder(backbone: nn.Module, *, ema_decay: float = 0.996) -> EMATargetEncoder:
    """The paper's target encoder.

    Args:
        backbone: see `EMATargetEncoder`.
        ema_decay: tau in [0, 1).

    Raises:
        ValueError: see `EMATargetEncoder`.

    Source: DLLM-JEPA, arXiv 2606.00091.
    """
    return EMATargetEncoder(backbone, ema_decay=ema_decay)
