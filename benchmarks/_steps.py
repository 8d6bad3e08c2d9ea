"""Whole training steps, to be measured: the steps of the full recipe, and references that score every position.

Shape legend: B sequences, T tokens of a row, V vocabulary, D hidden, n masked tokens.
"""

import argparse
import copy
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dllm_jepa.data import BatchPlan, MicroBatch, TrainingBatches
from dllm_jepa.jepa import (
    EMATargetEncoder,
    GlobalCounts,
    band_sums,
    fixed_ratio_views,
    jepa_loss,
    masked_token_weights,
    pool,
    transformer_predictor,
)
from dllm_jepa.models import DTYPES, Backbone, MaskedDiffusionLM, choose_packed_attention, init_rope, use_float8
from dllm_jepa.models.llada import llada

JEPA_WEIGHT = 1.0
SIZES = ("vocab_size", "embed_dim", "num_layers", "num_heads", "mlp_dim")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Arm:
    """A kind of step.

    Args:
        jepa: with the target branch; without it the step is plain diffusion.
        reference: instead of the recipe's step, one of two in padded rows with logits [B, T, V]: "everywhere" has a
            loss at every position, which weighs nothing where no token is masked; "masked" has losses at the masked
            positions only.
        packed: one packed row, instead of padded rows.
        compiled: compiled layers and loss.
        float8: the products of the target branch are in float8.
    """

    jepa: bool = False
    reference: Literal["everywhere", "masked"] | None = None
    packed: bool = True
    compiled: bool = False
    float8: bool = False


ARMS = {
    "full_diffusion": Arm(reference="everywhere", packed=False),
    "full_head_diffusion": Arm(reference="masked", packed=False),
    "diffusion": Arm(),
    "jepa": Arm(jepa=True),
    "diffusion_padded": Arm(packed=False),
    "jepa_padded": Arm(jepa=True, packed=False),
    "diffusion_compiled": Arm(compiled=True),
    "jepa_compiled": Arm(jepa=True, compiled=True),
    "jepa_float8": Arm(jepa=True, float8=True),
    "jepa_float8_compiled": Arm(jepa=True, float8=True, compiled=True),
}


@dataclass(frozen=True)
class Setting:
    """What all arms of a measurement share: model, data and how they are run.

    Args:
        embed_dim: D.
        num_layers: transformer layers.
        num_heads: query heads.
        mlp_dim: width of the feed-forward layers.
        vocab_size: V, the mask and the padding token included.
        num_sequences: B, sequences of a step.
        num_tokens: tokens of the longest sequence.
        shortest: tokens of the shortest one, lengths are uniform between; 0: all are equally long.
        mask_ratio: of the context views, in (0, 1).
        device: cpu or cuda; on cuda matrix products are in bf16.
        dtype: of the stored weights: fp32 (fused AdamW), or bf16 (AdamW8bit with stochastic rounding).
        logits_chunk_tokens: tokens that the head scores at a time.
        threads: of the CPU.
    """

    embed_dim: int = 256
    num_layers: int = 6
    num_heads: int = 8
    mlp_dim: int = 1024
    vocab_size: int = 32000
    num_sequences: int = 8
    num_tokens: int = 256
    shortest: int = 0
    mask_ratio: float = 0.2
    device: str = "cpu"
    dtype: str = "fp32"
    logits_chunk_tokens: int = 1024
    threads: int = 2

    @classmethod
    def add_options(cls, parser: argparse.ArgumentParser) -> None:
        """Make every field an option."""
        choices = {"device": ("cpu", "cuda"), "dtype": tuple(DTYPES)}
        for field in fields(cls):
            option = f"--{field.name.replace('_', '-')}"
            parser.add_argument(option, type=field.type, default=field.default, choices=choices.get(field.name))

    @classmethod
    def from_options(cls, arguments: argparse.Namespace) -> "Setting":
        """The setting that was asked for."""
        return cls(**{field.name: getattr(arguments, field.name) for field in fields(cls)})

    @property
    def mask_id(self) -> int:
        """The last token; padding is the one before it."""
        return self.vocab_size - 1

    def batches(self, packed: bool) -> TrainingBatches:
        """Random sequences, one micro-batch a step, in the same order for both layouts."""
        generator = np.random.default_rng(0)
        lengths = generator.integers(self.shortest or self.num_tokens, self.num_tokens + 1, 16 * self.num_sequences)
        clean = [generator.integers(self.vocab_size - 2, size=length, dtype=np.int32) for length in lengths]
        plan = BatchPlan(
            lengths,
            global_batch_size=self.num_sequences,
            tokens_per_device=self.num_sequences * self.num_tokens,
            num_ranks=1,
            seed=0,
            packed=packed,
            unsplit_for="the benchmark",
        )
        return TrainingBatches(
            [(tokens, np.ones(len(tokens), dtype=np.bool_)) for tokens in clean],
            plan,
            fixed_ratio_views(context_ratio=self.mask_ratio, target_ratio=max(0.7, (1 + self.mask_ratio) / 2)),
            rank=0,
            seed=0,
            mask_id=self.mask_id,
            pad_id=self.mask_id - 1,
            packed=packed,
        )


class Trainer:
    """Weights, optimizer and data; takes a step of any arm that it was built for.

    Args:
        setting: see `Setting`.
        arms: the arms. All of them train the same weights; those that run them in another way have copies of the
            modules around them.
        checkpointing: activation checkpointing of every layer of the online model.
        model: a model with weights, to start from; None means random weights, the same for a setting.
    """

    def __init__(
        self, setting: Setting, arms: Iterable[Arm], *, checkpointing: bool, model: MaskedDiffusionLM | None = None
    ) -> None:
        """Build everything."""
        torch.manual_seed(0)
        arms = [*arms]
        self.setting = setting
        self.device = torch.device(setting.device)
        self.compute_dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model = self._model(self.device) if model is None else model
        init_rope(self.model)
        self.trained = nn.ModuleDict({"model": self.model})
        self.models = {compiled: self._online(compiled, checkpointing) for compiled in {arm.compiled for arm in arms}}
        if any(arm.jepa for arm in arms):
            backbone = self._model(torch.device("meta")).backbone.to_empty(device=self.device)
            init_rope(backbone)
            self.target_encoder = EMATargetEncoder(backbone, ema_decay=0.996)
            self.target_encoder.copy_from(self.model.backbone)
            kinds = {(arm.compiled, arm.float8) for arm in arms if arm.jepa}
            self.embedders = {kind: self._embedder(backbone, *kind) for kind in kinds}
            with self.device:
                predictor = transformer_predictor(setting.embed_dim, setting.mlp_dim)
            self.trained["predictor"] = predictor.to(DTYPES[setting.dtype])
        self.optimizer = self._optimizer()
        self.batches = {packed: setting.batches(packed) for packed in (True, False)}

    def _model(self, device: torch.device) -> MaskedDiffusionLM:
        with device:
            sizes = {name: getattr(self.setting, name) for name in SIZES}
            return llada(**sizes, max_seq_len=self.setting.num_tokens).to(DTYPES[self.setting.dtype])

    def _online(self, compiled: bool, checkpointing: bool) -> MaskedDiffusionLM:
        model = around_the_same_weights(self.model)
        if compiled:
            model.compile_layers()
        if checkpointing:
            model.checkpoint_layers()
        choose_packed_attention(model, self.device, self.compute_dtype)
        return model

    def _embedder(self, backbone: Backbone, compiled: bool, float8: bool) -> EMATargetEncoder:
        backbone = around_the_same_weights(backbone)
        if float8:
            use_float8(backbone)
        if compiled:
            backbone.compile_layers()
        choose_packed_attention(backbone, self.device, self.compute_dtype)
        return EMATargetEncoder(backbone, ema_decay=0.996)

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.setting.dtype == "fp32":
            return torch.optim.AdamW(self.trained.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        from torchao.optim import AdamW8bit  # it compiles its step: only where it is used

        return AdamW8bit(self.trained.parameters(), lr=1e-5, weight_decay=0.0, bf16_stochastic_round=True)

    def step(self, arm: Arm, number: int) -> dict[str, float]:
        """One whole step, from drawing the views to the update of the average; returns its losses."""
        (batch,) = (batch.to(self.device) for batch in self.batches[arm.packed].step(number))
        losses = self.losses(batch, arm)
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if arm.jepa:
            self.target_encoder.update(self.model.backbone)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return {name: loss.item() for name, loss in losses.items()}

    def losses(self, batch: MicroBatch, arm: Arm) -> dict[str, Tensor]:
        """Forward and backward."""
        return self.recipe_losses(batch, arm) if arm.reference is None else self.reference_losses(batch, arm)

    def recipe_losses(self, batch: MicroBatch, arm: Arm) -> dict[str, Tensor]:
        """Those of the full recipe."""
        counts, mask, target = GlobalCounts(*batch.counts()), batch.attention_mask, None
        if arm.jepa:
            with self.autocast():
                target = self.embedders[arm.compiled, arm.float8].embed(
                    batch.target,
                    batch.target_ids,
                    batch.num_sequences,
                    visible=None if arm.compiled else batch.target_visible,
                    mask=mask,
                    input_pos=batch.input_pos,
                )
        weights = masked_token_weights("mean", counts, **batch.loss_counts())  # [n]
        with self.autocast():
            model = self.models[arm.compiled]
            hidden = model(batch.context, attention_mask=mask, input_pos=batch.input_pos)
            diffusion_loss, token_loss = model.score(
                hidden,
                batch.masked_positions,
                labels=batch.labels,
                token_weights=weights,
                chunk_tokens=self.setting.logits_chunk_tokens,
                attention_mask=mask,
            )
            alignment_loss = torch.zeros_like(diffusion_loss)
            if target is not None:
                pooled = pool(hidden, batch.context_ids, batch.num_sequences)
                pred = self.trained["predictor"](pooled.to(hidden.dtype))
                alignment_loss = jepa_loss(target, pred, counts)
        (diffusion_loss + JEPA_WEIGHT * alignment_loss).backward()
        losses = {"diffusion_loss": diffusion_loss.detach(), "jepa_loss": alignment_loss.detach()}
        bands = band_sums(token_loss, **batch.loss_counts())
        return losses | {name: total / count for name, (total, count) in bands.items()}

    def reference_losses(self, batch: MicroBatch, arm: Arm) -> dict[str, Tensor]:
        """Those of a step as it is usually written: plain diffusion in padded rows, all logits at once."""
        model = self.models[arm.compiled]
        assert isinstance(batch.attention_mask, Tensor) and model.head is not None
        with self.autocast():
            logits = model.head(model.backbone(batch.context, mask=batch.attention_mask))  # [B, T, V]
        masked = batch.context == self.setting.mask_id  # [B, T]
        weights = masked / masked.sum(1, keepdim=True) / len(masked)  # [B, T]
        if arm.reference == "masked":
            token_loss = F.cross_entropy(logits[masked].float(), batch.labels, reduction="none")  # [n]
            loss = (weights[masked] * token_loss).sum()
        else:
            clean = batch.context.masked_scatter(masked, batch.labels)  # [B, T]
            token_loss = F.cross_entropy(logits.flatten(0, 1).float(), clean.flatten(), reduction="none")  # [B * T]
            loss = (weights.flatten() * token_loss).sum()
        loss.backward()
        return {"diffusion_loss": loss.detach()}

    def autocast(self) -> torch.autocast:
        """Products in bf16 on a GPU."""
        return torch.autocast(self.device.type, self.compute_dtype, enabled=self.device.type == "cuda")


def around_the_same_weights(module: ModuleT) -> ModuleT:
    """A copy of a module that holds the very same parameters."""
    return copy.deepcopy(module, {id(param): param for param in module.parameters()})
