"""The target encoder of LoRA: the online model itself, with averaged adapters for as long as it embeds.

Shape legend: B rows, T tokens of a row, D hidden, S sequences.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import Tensor, nn

from dllm_jepa.jepa._pooling import pool
from dllm_jepa.jepa._stochastic_rounding import own_shard
from dllm_jepa.jepa._target_encoder import CopyBackbone


class EMAAdapterTargetEncoder:
    """Exponential moving average of the adapters of the online model, which shares its frozen base.

    The averages are all that it keeps in memory, sharded like the adapters. To embed, averages and adapters change
    places, without arithmetic, so that both come back as they were; only while they do is there a third copy.

    Args:
        model: the online model, filled; called as `model(tokens, attention_mask=..., input_pos=..., hidden_at=...)`
            for hidden states. Its parameters with a gradient are the adapters, in fp32.
        ema_decay: tau in [0, 1): the share of the old average that an update keeps.

    Raises:
        ValueError: if `ema_decay` is out of range, or the adapters are not fp32 or not there.
    """

    def __init__(self, model: nn.Module, *, ema_decay: float) -> None:
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        params = model.state_dict(keep_vars=True)
        self._adapters = {name: param for name, param in params.items() if param.requires_grad}
        if len(self._adapters) in (0, len(params)):
            raise ValueError("the model has no adapters on a frozen base; average its backbone by ema_target_encoder")
        if wrong := {str(param.dtype) for param in self._adapters.values() if param.dtype != torch.float32}:
            raise ValueError(f"averages are kept in fp32, got adapters of {', '.join(sorted(wrong))}")
        self._model = model
        self._averages = {name: param.detach().clone() for name, param in self._adapters.items()}
        self.ema_decay = ema_decay

    @torch.no_grad()
    def embed(
        self,
        tokens: Tensor,
        sequence_ids: Tensor,
        num_sequences: int,
        *,
        visible: Tensor | None = None,
        layer_norm: bool = True,
        mask: Any = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """Embed the target view; no gradient, no head, no dropout.

        Args:
            tokens: int64 [B, T], target view.
            sequence_ids: int64 [B, T], see `pool`.
            num_sequences: S.
            visible: int64 [m], flat positions of the tokens whose `sequence_ids` are not -1. Given them, the last layer
                is computed for no others; the embedding is the same.
            layer_norm: see `pool`.
            mask: `attention_mask` of the model.
            input_pos: int64 [B, T], position of each token in its sequence.

        Returns:
            fp32 [S, D].
        """
        with self._averages_in_place():
            hidden = self._model(tokens, attention_mask=mask, input_pos=input_pos, hidden_at=visible)
        if visible is not None:
            sequence_ids = sequence_ids.flatten().index_select(0, visible)
        return pool(hidden, sequence_ids, num_sequences, layer_norm=layer_norm)

    @torch.no_grad()
    def update(self, online_backbone: nn.Module) -> None:
        """Move towards the adapters: average <- tau * average + (1 - tau) * adapter. Call after the optimizer."""
        del online_backbone  # part of the interface of target encoders; the adapters are known
        torch._foreach_lerp_(_local(self._averages), _local(self._adapters), 1 - self.ema_decay)

    def tensors(self) -> dict[str, Tensor]:
        """The averages, live: to be saved, or loaded in place."""
        return self._averages

    def weights(self, online: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The adapters of the online model by name, as averages."""
        return {**online, **self.tensors()}

    @contextmanager
    def _averages_in_place(self) -> Iterator[None]:
        was_training = self._model.training
        self._model.eval()
        self._exchange()
        try:
            yield
        finally:
            self._exchange()
            self._model.train(was_training)

    def _exchange(self) -> None:
        adapters, averages = _local(self._adapters), _local(self._averages)
        stash = [adapter.clone() for adapter in adapters]
        torch._foreach_copy_(adapters, averages)
        torch._foreach_copy_(averages, stash)


def ema_adapter_target_encoder(
    model: nn.Module, copy_backbone: CopyBackbone | None = None, *, ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.996
) -> EMAAdapterTargetEncoder:
    """The paper's target encoder for LoRA, see `EMAAdapterTargetEncoder`.

    Source: DLLM-JEPA, arXiv 2606.00091.
    """
    del copy_backbone  # the base is shared
    return EMAAdapterTargetEncoder(model, ema_decay=ema_decay)


def _local(tensors: dict[str, Tensor]) -> list[Tensor]:
    """What this rank holds of each; every one of these operations is element by element."""
    return [own_shard(tensor).detach() for tensor in tensors.values()]
