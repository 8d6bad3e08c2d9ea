"""The slowly moving copy of the backbone that embeds the target view.

Shape legend: B rows, T tokens of a row, D hidden, S sequences.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from dllm_jepa.jepa._pooling import pool
from dllm_jepa.jepa._stochastic_rounding import stochastic_lerp_


class CopyBackbone(Protocol):
    """Makes a backbone like the online one: the same parameters and sharding, not filled."""

    def __call__(self, dtype: str, *, float8: bool = False) -> nn.Module:
        """One whose parameters are of `dtype` ("fp32" or "bf16"), computing its linear layers in float8 if asked to."""
        ...


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

    def weights(self, online: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the online model by name, with the average in place of its backbone; it has no head."""
        return {**online, **{f"backbone.{name}": tensor for name, tensor in self.tensors().items()}}


def ema_target_encoder(
    model: nn.Module,
    copy_backbone: CopyBackbone,
    *,
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.996,
    dtype: Literal["fp32", "bf16"] = "fp32",
    float8: bool = False,
) -> EMATargetEncoder:
    """The paper's target encoder: an average of the whole backbone.

    Args:
        model: the online model, filled; its `backbone` is averaged.
        copy_backbone: makes another such backbone, see `CopyBackbone`.
        ema_decay: tau in [0, 1).
        dtype: type of the average. bf16 takes half the memory and is rounded stochastically.
        float8: linear layers of the average compute in float8; the average itself stays in `dtype`.

    Source: DLLM-JEPA, arXiv 2606.00091.
    """
    backbone = copy_backbone(dtype, float8=True) if float8 else copy_backbone(dtype)
    encoder = EMATargetEncoder(backbone, ema_decay=ema_decay)
    encoder.copy_from(model.get_submodule("backbone"))
    return encoder
