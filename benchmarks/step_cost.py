"""Time and peak memory of whole training steps, against steps that score every position.

    python benchmarks/step_cost.py [--embed-dim 256] [--num-layers 6] ... [--compile] [--arms jepa diffusion]
    python benchmarks/step_cost.py --profile jepa
    python benchmarks/step_cost.py --device cuda --embed-dim 4096 --num-layers 32 --num-heads 32 --mlp-dim 12288 \
        --vocab-size 126464 --num-sequences 16 --num-tokens 512 --dtype bf16 --checkpointing on

The arms train one model: `full_diffusion` and `full_jepa` are small steps written here in the usual way, with logits
[B, T, V] in every view; `diffusion` and `jepa` are the steps of the full recipe, in packed rows; `..._padded` the same
in padded rows. `--shortest` draws lengths, which is where the two layouts differ.

Times: all arms alternately in one process, which holds one set of weights for all of them, medians. Memory: every arm
in a process of its own, its peak above what the process holds after its imports (CPU: resident size, Linux; CUDA:
allocated). Prints one JSON line a measurement and a table last. On CPU only the ratios mean anything.

Shape legend: B sequences, T tokens of a row, V vocabulary, D hidden, n masked tokens.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TransformerSelfAttentionLayer
from torchtune.training import compile_model, set_activation_checkpointing

from dllm_jepa import __version__
from dllm_jepa.data import BatchPlan, MicroBatch, TrainingBatches
from dllm_jepa.jepa import (
    EMATargetEncoder,
    GlobalCounts,
    StepSums,
    ema_target_encoder,
    fixed_ratio_views,
    jepa_loss,
    masked_token_loss,
    masked_token_weights,
    pool,
    transformer_predictor,
)
from dllm_jepa.models import MaskedDiffusionLM, init_rope
from dllm_jepa.models.llada import llada

WARM_UP = 3  # steps of every arm that are not timed
JEPA_WEIGHT = 1.0
SIZES = ("vocab_size", "embed_dim", "num_layers", "num_heads", "mlp_dim")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Arm:
    """A kind of step.

    Args:
        jepa: with the target branch; without it the step is plain diffusion.
        full_logits: the reference, instead of the recipe's step.
        packed: one packed row, instead of padded rows.
    """

    jepa: bool
    full_logits: bool
    packed: bool


ARMS = {
    "full_diffusion": Arm(jepa=False, full_logits=True, packed=False),
    "full_jepa": Arm(jepa=True, full_logits=True, packed=False),
    "diffusion": Arm(jepa=False, full_logits=False, packed=True),
    "jepa": Arm(jepa=True, full_logits=False, packed=True),
    "diffusion_padded": Arm(jepa=False, full_logits=False, packed=False),
    "jepa_padded": Arm(jepa=True, full_logits=False, packed=False),
}

# (above, below, limit of the time, limit of the memory), each limit (without, with) activation checkpointing.
RATIOS: list[tuple[str, str, tuple[float, float] | None, tuple[float, float] | None]] = [
    ("jepa", "full_jepa", (0.58, 0.75), (0.62, 0.45)),
    ("jepa", "full_diffusion", (0.58, 0.75), (0.62, 0.45)),
    ("jepa", "diffusion", (1.25, 1.25), None),
    ("diffusion", "full_diffusion", None, None),
    ("jepa", "jepa_padded", None, None),
    ("diffusion", "diffusion_padded", None, None),
]


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
        threads: of the CPU.
        compile: compile every layer.
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
    threads: int = 2
    compile: bool = False

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
            accumulates=False,
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
    """Weights, optimizer and data; takes a step of any arm.

    Args:
        setting: see `Setting`.
        jepa: with predictor and target encoder; without them it takes steps of plain diffusion only.
        checkpointing: activation checkpointing of every layer of the online model.
    """

    def __init__(self, setting: Setting, *, jepa: bool, checkpointing: bool) -> None:
        """Build everything from random weights, the same for a setting."""
        torch.manual_seed(0)
        self.setting = setting
        self.device = torch.device(setting.device)
        self.model = self._model()
        self.trained = nn.ModuleDict({"model": self.model})
        if jepa:
            self.target_encoder: EMATargetEncoder = ema_target_encoder(self._model().backbone, dtype=setting.dtype)
            self.target_encoder.copy_from(self.model.backbone)
            with self.device:
                predictor = transformer_predictor(setting.embed_dim, setting.mlp_dim)
            self.trained["predictor"] = predictor.to(DTYPES[setting.dtype])
        if checkpointing:
            set_activation_checkpointing(self.model, auto_wrap_policy={TransformerSelfAttentionLayer})
        self.optimizer = self._optimizer()
        self.batches = {packed: setting.batches(packed) for packed in (True, False)}

    def _model(self) -> MaskedDiffusionLM:
        setting = self.setting
        with self.device:
            model = llada(**{name: getattr(setting, name) for name in SIZES}, max_seq_len=setting.num_tokens)
        model = model.to(DTYPES[setting.dtype])
        init_rope(model)
        if setting.compile:
            compile_model(model.backbone, verbose=False)
        return model

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.setting.dtype == "fp32":
            return torch.optim.AdamW(self.trained.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        from torchao.optim import AdamW8bit  # it compiles its step: only where it is used

        return AdamW8bit(self.trained.parameters(), lr=1e-5, weight_decay=0.0, bf16_stochastic_round=True)

    def step(self, arm: Arm, number: int) -> dict[str, float]:
        """One whole step, from drawing the views to the update of the average; returns its losses."""
        (batch,) = (batch.to(self.device) for batch in self.batches[arm.packed].step(number))
        losses = (self.full_logits_losses if arm.full_logits else self.losses)(batch, arm.jepa)
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if arm.jepa:
            self.target_encoder.update(self.model.backbone)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return losses

    def losses(self, batch: MicroBatch, jepa: bool) -> dict[str, float]:
        """Forward and backward of the full recipe."""
        counts, mask, target = GlobalCounts(*batch.counts()), batch.attention_mask, None
        if jepa:
            with self.autocast():
                target = self.target_encoder.embed(
                    batch.target, batch.target_ids, batch.num_sequences, mask=mask, input_pos=batch.input_pos
                )
        with self.autocast():
            hidden, logits = self.model(
                batch.context, attention_mask=mask, input_pos=batch.input_pos, logits_at=batch.masked_positions
            )
        token_loss = masked_token_loss(logits, batch.labels)  # [n]
        weights = masked_token_weights("mean", counts, **batch.loss_counts())  # [n]
        diffusion_loss = (weights * token_loss).sum()
        alignment_loss = torch.zeros_like(diffusion_loss)
        if target is not None:
            pooled = pool(hidden, batch.context_ids, batch.num_sequences)
            with self.autocast():
                pred = self.trained["predictor"](pooled.to(hidden.dtype))
            alignment_loss = jepa_loss(target, pred, counts)
        (diffusion_loss + JEPA_WEIGHT * alignment_loss).backward()
        sums = StepSums(self.device)
        sums.add(diffusion_loss, alignment_loss, token_loss, **batch.loss_counts())
        return sums.read(sums.values, jepa_weight=JEPA_WEIGHT, penalty=0.0)

    def full_logits_losses(self, batch: MicroBatch, jepa: bool) -> dict[str, float]:
        """Forward and backward of the reference: padded rows, and the head on every token of every view."""
        assert isinstance(batch.attention_mask, Tensor) and self.model.head is not None
        real, target = batch.attention_mask, None
        if jepa:
            with torch.no_grad(), self.autocast():
                hidden = self.target_encoder.backbone(batch.target, mask=real)
                self.model.head(hidden)  # [B, T, V]: a model called as a whole returns its logits
                target = mean_of_visible(hidden, real & (batch.target != self.setting.mask_id))
        with self.autocast():
            hidden = self.model.backbone(batch.context, mask=real)
            logits = self.model.head(hidden)  # [B, T, V]
        masked = batch.context == self.setting.mask_id  # [B, T]
        token_loss = F.cross_entropy(logits[masked].float(), batch.labels, reduction="none")  # [n]
        num_masked = masked.sum(1)
        diffusion_loss = (token_loss / num_masked.repeat_interleave(num_masked)).sum() / len(masked)
        alignment_loss = torch.zeros_like(diffusion_loss)
        if target is not None:
            with self.autocast():
                pred = self.trained["predictor"](mean_of_visible(hidden, real & ~masked).to(hidden.dtype))
            alignment_loss = 1 - F.cosine_similarity(pred.float(), target, dim=-1).mean()
        (diffusion_loss + JEPA_WEIGHT * alignment_loss).backward()
        return {"diffusion_loss": diffusion_loss.item(), "jepa_loss": alignment_loss.item()}

    def autocast(self) -> torch.autocast:
        """Products in bf16 on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


def mean_of_visible(hidden: Tensor, visible: Tensor) -> Tensor:
    """Normalized mean of the visible tokens of every row: [B, T, D] and bool [B, T] to fp32 [B, D]."""
    means = (hidden.float() * visible[..., None]).sum(1) / visible.sum(1, keepdim=True)
    return F.layer_norm(means, means.shape[-1:])


def time_steps(setting: Setting, names: Iterable[str], *, checkpointing: bool, steps: int) -> dict[str, list[float]]:
    """Seconds of every step of every arm, taken in turn, every other round backwards."""
    torch.set_num_threads(setting.threads)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    trainer = Trainer(setting, jepa=any(ARMS[name].jepa for name in seconds), checkpointing=checkpointing)
    for number in range(WARM_UP + steps):
        for name in [*seconds] if number % 2 else reversed(seconds):
            start = time.perf_counter()
            trainer.step(ARMS[name], number)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def peak_here(setting: Setting, name: str, *, checkpointing: bool, steps: int = WARM_UP) -> int:
    """Bytes at the peak of some steps of an arm above what this process holds now."""
    torch.set_num_threads(setting.threads)
    if setting.device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of the imports
    before = resident("VmRSS")
    trainer = Trainer(setting, jepa=ARMS[name].jepa, checkpointing=checkpointing)
    for number in range(steps):
        trainer.step(ARMS[name], number)
    return resident("VmHWM") - before if setting.device == "cpu" else torch.cuda.max_memory_allocated()


def peak_alone(setting: Setting, name: str, *, checkpointing: bool) -> int:
    """`peak_here` in a process of its own, right after its imports."""
    call = json.dumps({"setting": asdict(setting), "name": name, "checkpointing": checkpointing})
    command = [sys.executable, __file__, "--peak", call]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def resident(field: str) -> int:
    """Resident size of this process now (VmRSS) or at its peak (VmHWM), bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def profile(setting: Setting, name: str, *, checkpointing: bool, steps: int = 5) -> str:
    """The operators that take most of the time of an arm, as a table."""
    torch.set_num_threads(setting.threads)
    trainer = Trainer(setting, jepa=ARMS[name].jepa, checkpointing=checkpointing)
    for number in range(WARM_UP):
        trainer.step(ARMS[name], number)
    with torch.profiler.profile() as profiler:
        for number in range(WARM_UP, WARM_UP + steps):
            trainer.step(ARMS[name], number)
    return str(profiler.key_averages().table(sort_by=f"self_{setting.device}_time_total", row_limit=15))


def print_ratios(rows: dict[tuple[str, bool], dict[str, Any]]) -> None:
    """The ratios, and the limits that the design sets them."""
    print("\n| ratio | activation checkpointing | time | limit | peak memory | limit |\n|---|---|---|---|---|---|")
    for above, below, *limits in RATIOS:
        for checkpointing in (False, True):
            if (above, checkpointing) not in rows or (below, checkpointing) not in rows:
                continue
            cells = []
            for key, limit in zip(("step_s", "peak_mib"), limits, strict=True):
                ratio = rows[above, checkpointing][key] / rows[below, checkpointing][key]
                cells += [f"{ratio:.3f}", "" if limit is None else f"{limit[checkpointing]:.2f}"]
            print(f"| {above} / {below} | {'on' if checkpointing else 'off'} | {' | '.join(cells)} |")


def describe_machine(setting: Setting) -> str:
    """Versions, commit and hardware."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    hardware = f"{platform.machine()}, {os.cpu_count()} CPUs, {setting.threads} threads"
    if setting.device == "cuda":
        hardware += f", {torch.cuda.get_device_name()}"
    python = platform.python_version()
    return f"dllm-jepa {__version__} (commit {commit}), torch {torch.__version__}, Python {python}, {hardware}"


def read_arguments(words: list[str]) -> tuple[Setting, argparse.Namespace]:
    """The setting, each field an option, and what is to be done with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = {"device": ("cpu", "cuda"), "dtype": tuple(DTYPES)}
    for field in fields(Setting):
        option = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=field.type, default=field.default, choices=choices.get(field.name))
    parser.add_argument("--steps", type=int, default=30, help="timed steps of every arm")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS])
    parser.add_argument("--checkpointing", choices=("off", "on", "both"), default="both")
    parser.add_argument("--profile", choices=ARMS, help="print what takes the time of an arm instead")
    arguments = parser.parse_args(words)
    return Setting(**{field.name: getattr(arguments, field.name) for field in fields(Setting)}), arguments


def main(words: list[str]) -> None:
    """Measure and print."""
    if words[:1] == ["--peak"]:
        call = json.loads(words[1])
        print(peak_here(Setting(**call.pop("setting")), **call))
        return
    setting, arguments = read_arguments(words)
    kinds = [False, True] if arguments.checkpointing == "both" else [arguments.checkpointing == "on"]
    print(f"{describe_machine(setting)}\n{json.dumps(asdict(setting) | {'steps': arguments.steps})}", flush=True)
    if arguments.profile is not None:
        print(profile(setting, arguments.profile, checkpointing=kinds[0]))
        return
    rows: dict[tuple[str, bool], dict[str, Any]] = {}
    for checkpointing in kinds:
        # Memory first: on a GPU these processes need what the alternating steps will hold.
        for name in arguments.arms:
            peak_mib = round(peak_alone(setting, name, checkpointing=checkpointing) / 2**20, 1)
            rows[name, checkpointing] = {"arm": name, "activation_checkpointing": checkpointing, "peak_mib": peak_mib}
            print(json.dumps(rows[name, checkpointing]), flush=True)
        timed = time_steps(setting, arguments.arms, checkpointing=checkpointing, steps=arguments.steps)
        for name, seconds in timed.items():
            rows[name, checkpointing]["step_s"] = round(statistics.median(seconds), 4)
            print(json.dumps(rows[name, checkpointing]), flush=True)
    print_ratios(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
