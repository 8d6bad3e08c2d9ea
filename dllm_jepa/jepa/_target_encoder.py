"""The slowly moving copy of the backbone that embeds the target view.

Shape legend: B rows, T tokens of a row, D hidden, S sequences.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchao.float8.float8_linear import Float8Linear

from dllm_jepa.jepa._pooling import pool
from dllm_jepa.jepa._stochastic_rounding import stochastic_lerp_

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class EMATargetEncoder:
    """Exponential moving average of the online backbone, in fp32 or in bf16.

    In bf16 with round-to-nearest, updates of 0.4 % of the distance are lost, and the target would stay the base model.
    A bf16 average is therefore rounded stochastically: it takes half the memory, and its expectation is the fp32
    average.

    Args:
        backbone: a module with the online backbone's parameters and sharding, all in fp32 or all in bf16. It is owned
            by the encoder, frozen and put into evaluation mode.
        ema_decay: tau in [0, 1): the share of the old average that an update keeps.

    Raises:
        ValueError: if `ema_decay` is out of range, or the parameters are neither all fp32 nor all bf16.
    """

    def __init__(self, backbone: nn.Module, *, ema_decay: float) -> None:
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        dtypes = {param.dtype for param in backbone.parameters()}
        if dtypes not in ({torch.float32}, {torch.bfloat16}):
            raise ValueError(
                "the target encoder's parameters must be all fp32 or all bf16, got "
                f"{', '.join(sorted(str(dtype) for dtype in dtypes))}"
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
        self,
        tokens: Tensor,
        sequence_ids: Tensor,
        num_sequences: int,
        *,
        visible: Tensor | None = None,
        layer_norm: bool = True,
        **packing: Any,
    ) -> Tensor:
        """Embed the target view; no gradient, no head.

        Args:
            tokens: int64 [B, T], target view.
            sequence_ids: int64 [B, T], see `pool`.
            num_sequences: S.
            visible: int64 [m], flat positions of the tokens whose `sequence_ids` are not -1. Given them, the last layer
                is computed for no others; the embedding is the same.
            layer_norm: see `pool`.
            **packing: `mask` and `input_pos` of the backbone.

        Returns:
            fp32 [S, D].
        """
        hidden = self.backbone(tokens, hidden_at=visible, **packing)
        if visible is not None:
            sequence_ids = sequence_ids.flatten().index_select(0, visible)
        return pool(hidden, sequence_ids, num_sequences, layer_norm=layer_norm)

    @torch.no_grad()
    def update(self, online_backbone: nn.Module) -> None:
        """Move towards the online weights: average <- tau * average + (1 - tau) * online. Call after the optimizer."""
        averages: list[Tensor] = list(self.backbone.parameters())
        online: list[Tensor] = list(online_backbone.parameters())
        if averages[0].dtype == torch.bfloat16:
            stochastic_lerp_(averages, online, 1 - self.ema_decay)
            return
        if all(param.dtype == torch.float32 for param in online):
            torch._foreach_lerp_(averages, online, 1 - self.ema_decay)
            return
        for average, param in zip(averages, online, strict=True):  # never a second fp32 copy of the whole model
            average.lerp_(param.float(), 1 - self.ema_decay)

    def tensors(self) -> dict[str, Tensor]:
        """The average, live: to be saved, or loaded in place."""
        return self.backbone.state_dict()


def ema_target_encoder(
    backbone: nn.Module, *, ema_decay: float = 0.996, dtype: Literal["fp32", "bf16"] = "fp32", float8: bool = False
) -> EMATargetEncoder:
    """The paper's target encoder.

    Args:
        backbone: see `EMATargetEncoder`; its parameters are of `dtype`.
        ema_decay: tau in [0, 1).
        dtype: type of the average. bf16 takes half the memory and is rounded stochastically.
        float8: linear layers of the backbone compute in float8 (`models.use_float8`); the average stays in `dtype`.

    Raises:
        ValueError: if a parameter is not of `dtype`, or the backbone does not compute as `float8` says, and see
            `EMATargetEncoder`.

    Source: DLLM-JEPA, arXiv 2606.00091.
    """
    if wrong := {str(param.dtype) for param in backbone.parameters() if param.dtype != _DTYPES[dtype]}:
        raise ValueError(f"a target encoder with dtype {dtype} got parameters of {', '.join(sorted(wrong))}")
    if float8 != any(isinstance(module, Float8Linear) for module in backbone.modules()):
        computes = "does not compute" if float8 else "computes"
        raise ValueError(
            f"a target encoder with float8 {float8} got a backbone that {computes} in float8: models.use_float8 "
            "converts it, before it is compiled and sharded"
        )
    return EMATargetEncoder(backbone, ema_decay=ema_decay)
