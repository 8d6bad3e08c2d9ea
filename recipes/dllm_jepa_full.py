"""Fine-tuning of a masked diffusion language model with the DLLM-JEPA objective: all weights, or adapters (LoRA).

One process, or any number of them with FSDP2:

    tune run dllm_jepa_full --config tiny
    tune run --nproc_per_node 8 dllm_jepa_full --config llada_8b checkpoint_dir=LLaDA-8B-Base output_dir=runs/gsm8k
    tune run dllm_jepa_lora --config llada_8b_lora checkpoint_dir=LLaDA-8B-Base output_dir=runs/gsm8k_lora

dllm_jepa_full and dllm_jepa_lora are one recipe under two names: what is trained is what its model leaves trainable.
Of a model with LoRA, DoRA or QLoRA adapters the base is frozen and shared by both branches, and the target encoder is
an average of the adapters alone.

To change it: `dllm-jepa cp dllm_jepa_full my.py`, edit `Config` and `train`, `tune run my.py --config ...`.

Shape legend: S sequences of a micro-batch, G of the global batch, n masked tokens, D hidden.
"""

import math
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Annotated, Any, Literal

import torch
from omegaconf import OmegaConf
from pydantic import Field
from torch import Tensor, nn

from dllm_jepa import config, jepa, preflight, training
from dllm_jepa.data import BatchPlan, MicroBatch, PrefetchedBatches, SequenceDataset, TrainingBatches, total_counts
from dllm_jepa.errors import LaunchError, UserError
from dllm_jepa.models import (
    DTYPES,
    Backbone,
    HFCheckpoint,
    InitialWeights,
    LoRAWeights,
    MaskedDiffusionLM,
    choose_packed_attention,
    init_rope,
    model_card,
    save_adapter,
    save_hf,
    save_merged,
    step_flops,
    use_float8,
)

EXPORTS = {None: (), "online": ("online",), "target": ("target",), "both": ("online", "target")}
ADAPTERS = {"online": "adapter", "target": "adapter_target"}


class Config(config.Training):
    """The keys of the method; those of every training recipe stand in `config.Training`. A copy adds its own here."""

    jepa_weight: Annotated[
        float, Field(ge=0, description="weight of the JEPA loss; 0 = plain diffusion, no target branch")
    ] = 1.0
    view_sampler: Annotated[
        config.Component, Field(description="draws the mask ratios of the context and target views")
    ]
    predictor: Annotated[
        Annotated[config.Component, config.Given(positional=("embed_dim", "mlp_dim"))] | None,
        Field(description="maps the pooled context embedding to the target's; needed unless jepa_weight is 0"),
    ] = None
    target_encoder: Annotated[
        Annotated[config.Component, config.Given(positional=("model", "copy_backbone"))] | None,
        Field(description="embeds the target view; needed unless jepa_weight is 0"),
    ] = None
    jepa_every: Annotated[int, Field(ge=1, description="run the target branch on every n-th step only")] = 1
    jepa_ratio: Annotated[
        float | None,
        Field(gt=0, le=1, description="run the target branch on this fraction of the steps; null = all"),
    ] = None
    shuffle_targets: Annotated[bool, Field(description="control: compare each sequence with another one's target")] = (
        False
    )
    l2_anchor_weight: Annotated[
        float, Field(ge=0, description="weight of the squared distance to the initial weights; 0 = off")
    ] = 0.0
    pooled_layer_norm: Annotated[
        bool, Field(description="LayerNorm without affine parameters on pooled embeddings")
    ] = True
    monitor_every: Annotated[
        int, config.MayChange, Field(ge=0, description="steps between collapse measurements; 0 = off")
    ] = 0
    loss_weight: Annotated[
        Literal["mean", "inverse_ratio", "token"],
        Field(description="diffusion loss: mean per sequence, LLaDA's 1/t, or mean over all masked tokens"),
    ] = "mean"
    logits_chunk_tokens: Annotated[
        config.Count,
        config.MayChange,
        Field(description="masked tokens scored at a time: bounds the memory of the logits, does not change the loss"),
    ] = 1024
    export: Annotated[
        Literal["online", "target", "both"] | None,
        config.MayChange,
        Field(
            description="model to write at the end: trained weights to output_dir/hf, the target encoder's to "
            "hf_target (of LoRA adapter, adapter_target); null = none"
        ),
    ] = "online"
    export_merged: Annotated[
        bool,
        config.MayChange,
        Field(description="of LoRA: besides the adapter, write the base with the adapter merged into it"),
    ] = False

    rules = (
        *config.Training.rules,
        config.rules.view_sampler_builds,
        config.rules.jepa_parts_present,
        config.rules.one_jepa_schedule,
        config.rules.shuffling_has_targets,
        config.rules.exported_target_exists,
        config.rules.average_of_what_is_trained,
        config.rules.bf16_average_in_one_process,
        config.rules.anchor_with_whole_gradients,
        config.rules.float8_on_gpu_in_bf16,
        config.rules.float8_capability,
        config.rules.merged_with_an_export,
    )
    remarks = (*config.Training.remarks, config.rules.float8_without_compile)
    opens = (preflight.model_opens, preflight.data_opens, preflight.disk_has_room, preflight.logger_is_installed)


class DLLMJEPARecipe:
    """Trains the online backbone, or its adapters, and a predictor against an EMA target encoder.

    Args:
        cfg: checked config; docs/configs.md lists its keys.
        ranks: the processes of the run.
        run: its output directory, and what it goes on from.
        signals: tells when it is asked to stop.
    """

    def __init__(
        self, cfg: Config, ranks: training.Ranks, run: training.RunDirectory, signals: training.StopSignals
    ) -> None:
        """Hold on to what the run is made from; `setup` builds its parts."""
        self.cfg = cfg
        self.ranks = ranks
        self.run = run
        self.signals = signals
        self.compute_dtype = DTYPES[cfg.compute_dtype]
        self.cleanup = ExitStack()  # what has to be closed, however the run ends

    def setup(self) -> None:
        """Build every part in order of use; what the user may have got wrong comes before what costs memory."""
        cfg = self.cfg
        changes = [] if self.run.resume_from is None else config.check_resume(cfg, self.run.resume_from.config)
        self.tokenizer = cfg.tokenizer.build()
        with torch.device("meta"):
            self.model: MaskedDiffusionLM = cfg.model.build()
        self.checkpoint = None if cfg.checkpoint_dir is None else HFCheckpoint(cfg.checkpoint_dir)
        if self.checkpoint is not None:
            self.checkpoint.check(self.model, mask_id=self.tokenizer.mask_id)
        self.model.check_fits(vocab_size=self.tokenizer.vocab_size, max_seq_len=cfg.max_seq_len)
        self.dataset, self.batches, steps_per_epoch = self.setup_batches()
        self.num_steps = cfg.max_steps or cfg.epochs * steps_per_epoch
        self.prefetched = PrefetchedBatches(self.batches, num_steps=self.num_steps, device=self.ranks.device)
        self.cleanup.callback(self.prefetched.close)
        self.run.check_steps(self.num_steps)
        self.base = self.checkpoint or InitialWeights(self.model, seed=cfg.seed)
        base_weights = {} if self.model.lora is None else {"base_weights": self.base.fingerprint()}
        self.fingerprint = training.run_fingerprint(
            self.ranks,
            seed=cfg.seed,
            base=cfg.checkpoint_dir,
            model=self.model.architecture(),
            data=self.dataset.fingerprint(),
            prompt=self.dataset.prompt,
            **base_weights,
        )
        if self.run.resume_from is not None:
            training.check_trained(self.run.resume_from, "model", self.model)
            changes += training.compare_fingerprints(
                self.run.resume_from.state, self.fingerprint, override=cfg.resume_override
            )
        metric_logger = training.build_metric_logger(cfg.metric_logger.build if cfg.metric_logger else None, self.ranks)
        self.setup_model()
        self.trained = nn.ModuleDict({"model": self.model})
        self.target_encoder: Any = None
        if cfg.jepa_weight > 0:
            assert cfg.target_encoder is not None and cfg.predictor is not None, "a rule of the config"
            self.target_encoder = cfg.target_encoder.build(self.model, self.copy_backbone)
            self.trained["predictor"] = self.setup_predictor(cfg.predictor)
        self.anchor = jepa.L2Anchor(self.model, weight=cfg.l2_anchor_weight) if cfg.l2_anchor_weight > 0 else None
        self.monitor = jepa.CollapseMonitor(
            monitor_every=cfg.monitor_every,
            global_batch_size=cfg.global_batch_size,
            embed_dim=self.model.sizes.embed_dim,
            device=self.ranks.device,
        )
        self.parts = {"target": self.target_encoder, "monitor": self.monitor, "anchor": self.anchor}
        self.optimizer = cfg.optimizer.build([param for param in self.trained.parameters() if param.requires_grad])
        self.optimizer_in_bwd = training.OptimizerInBackward(self.optimizer) if cfg.optimizer_in_bwd else None
        self.lr_scheduler = None
        if cfg.lr_scheduler is not None:
            self.lr_scheduler = cfg.lr_scheduler.build(self.optimizer, num_training_steps=self.num_steps)
        self.setup_run(metric_logger, changes)

    def setup_batches(self) -> tuple[SequenceDataset, TrainingBatches, int]:
        """Tokenize the dataset and plan its batches; returns both, and the steps of an epoch."""
        cfg = self.cfg
        dataset: SequenceDataset = cfg.dataset.build(
            tokenizer=self.tokenizer,
            max_seq_len=cfg.max_seq_len,
            shift_logits=self.model.shift_logits,
            progress=self.ranks.is_rank_zero,
        )
        plan = BatchPlan(
            dataset.lengths,
            global_batch_size=cfg.global_batch_size,
            tokens_per_device=cfg.tokens_per_device,
            num_ranks=self.ranks.world_size,
            seed=cfg.seed,
            packed=cfg.packed,
            unsplit_for="optimizer_in_bwd" if cfg.optimizer_in_bwd else None,
        )
        batches = TrainingBatches(
            dataset,
            plan,
            cfg.view_sampler.build(),
            rank=self.ranks.rank,
            seed=cfg.seed,
            mask_id=self.tokenizer.mask_id,
            pad_id=self.tokenizer.pad_id,
            packed=cfg.packed,
        )
        if self.ranks.is_rank_zero:
            print(f"{dataset}; {plan}", *(f"warning: {line}" for line in dataset.warnings), sep="\n")
        return dataset, batches, plan.steps_per_epoch

    def setup_model(self) -> None:
        """Wrap, shard and fill the online model; a frozen base is stored in the compute type or in NF4."""
        cfg = self.cfg
        if cfg.compile:
            self.model.compile_layers()
        if cfg.enable_activation_checkpointing:
            self.model.checkpoint_layers()
        training.shard(self.model, self.model.units, self.ranks, self.compute_dtype, kept=self.model.scorer)
        first: HFCheckpoint | InitialWeights | LoRAWeights = self.base
        if self.model.lora is not None:
            first = LoRAWeights(self.model, self.base, seed=cfg.seed, dtype=self.compute_dtype)
        training.materialize(
            self.model,
            first.read,
            dtype=DTYPES[cfg.dtype],
            frozen_dtype=self.compute_dtype,
            device=self.ranks.device,
        )
        init_rope(self.model)

    def copy_backbone(self, dtype: str, *, float8: bool = False) -> nn.Module:
        """A second backbone for the target encoder: sharded like the online one, in a type of its own, not filled."""
        with torch.device("meta"):
            backbone: Backbone = self.cfg.model.build().backbone
        if float8:
            use_float8(backbone)
        if self.cfg.compile:
            backbone.compile_layers()
        training.shard(backbone, [*backbone.layers], self.ranks, self.compute_dtype)
        training.materialize(backbone, None, dtype=DTYPES[dtype], device=self.ranks.device)
        init_rope(backbone)
        choose_packed_attention(backbone, self.ranks.device, self.compute_dtype)
        return backbone

    def setup_predictor(self, component: config.Component) -> nn.Module:
        """The predictor, with random weights."""
        sizes = self.model.sizes
        with torch.device("meta"):
            predictor: nn.Module = component.build(sizes.embed_dim, sizes.mlp_dim)
        first = InitialWeights(predictor, seed=self.cfg.seed)
        training.shard(predictor, [], self.ranks, self.compute_dtype)
        training.materialize(predictor, first.read, dtype=DTYPES[self.cfg.dtype], device=self.ranks.device)
        return predictor

    def setup_run(self, metric_logger: training.MetricLogger | None, changes: list[str]) -> None:
        """Go on from a training state, if there is one, and take the output directory into use."""
        cfg = self.cfg
        self.state = training.TrainingState(self.trained, self.optimizer, self.lr_scheduler, parts=self.parts)
        if self.run.resume_from is not None:
            self.state.load(self.run.resume_from, self.ranks, override=cfg.resume_override)
        self.config_yaml = cfg.to_yaml()
        self.run.open(self.config_yaml, changes)
        self.log = training.RunLog(
            self.run,
            metric_logger,
            training.build_profiler(cfg.profiler.build if cfg.profiler else None),
            self.ranks,
            num_steps=self.num_steps,
            log_every_n_steps=cfg.log_every_n_steps,
            peak_tflops=cfg.peak_tflops,
            samples=self.batches.samples,
            compiles=cfg.compile,
        )
        self.cleanup.callback(self.log.close)
        warning = training.warmup_warning(self.lr_scheduler, num_steps=self.num_steps)
        if warning and not cfg.max_steps:  # else it was said with the config
            self.log.say(f"warning: {warning}")
        self.log.say(choose_packed_attention(self.model, self.ranks.device, self.compute_dtype))
        if metric_logger is not None:
            metric_logger.log_config(OmegaConf.create(cfg.model_dump()))
        self.checkpoints = training.CheckpointWriter(
            self.run.checkpoints,
            self.ranks,
            config_yaml=self.config_yaml,
            fingerprint=self.fingerprint,
            every_n_steps=cfg.checkpoint.every_n_steps,
            keep_last=cfg.checkpoint.keep_last,
            keep_every=cfg.checkpoint.keep_every,
            async_save=cfg.checkpoint.async_save,
        )
        self.cleanup.callback(self.checkpoints.close)

    def train(self) -> None:
        """The loop."""
        cfg = self.cfg
        self.signals.defer()  # from here on a signal waits for the end of the step, and the state is saved
        for step in self.log.steps():
            self.ranks.seed(cfg.seed, step)  # for dropout and stochastic rounding; views have seeds of their own
            # 1. Views: two maskings of the same sequences, for every micro-batch of this step
            micro_batches = [batch.to(self.ranks.device) for batch in self.prefetched.step(step)]
            counts = jepa.GlobalCounts(*self.ranks.sum_numbers(total_counts(micro_batches)))
            self.log.lap("data")

            # 2. Target embeddings, one [S, D] a micro-batch: EMA weights, no gradient, no head
            targets = self.embed_targets(micro_batches, step)
            self.log.lap("target")

            pooled_rows = []
            for index, batch in enumerate(micro_batches):
                weights = jepa.masked_token_weights(cfg.loss_weight, counts, **batch.loss_counts())  # [n]
                with self.ranks.autocast(self.compute_dtype):
                    # 3. The one forward that carries gradient
                    hidden = self.model(
                        batch.context, attention_mask=batch.attention_mask, input_pos=batch.input_pos
                    )  # [B, T, D]
                    # 4. Losses: local sums over global counts; the head scores a chunk of masked tokens at a time
                    diffusion_loss, token_loss = self.model.score(
                        hidden,
                        batch.masked_positions,
                        labels=batch.labels,
                        token_weights=weights,
                        chunk_tokens=cfg.logits_chunk_tokens,
                        attention_mask=batch.attention_mask,
                    )
                    loss, jepa_loss = diffusion_loss, torch.zeros_like(diffusion_loss)
                    if targets is not None or self.monitor.collects(step):
                        pooled = jepa.pool(
                            hidden, batch.context_ids, batch.num_sequences, layer_norm=cfg.pooled_layer_norm
                        )
                        pooled_rows.append(pooled.detach())
                    if targets is not None:
                        pred = self.trained["predictor"](pooled.to(hidden.dtype))
                        jepa_loss = jepa.jepa_loss(targets[index], pred, counts)
                        loss = diffusion_loss + cfg.jepa_weight * jepa_loss
                self.log.lap("forward")
                # 5. Backward
                loss.backward()
                self.log.add("diffusion_loss", diffusion_loss)
                self.log.add("jepa_loss", jepa_loss)
                for band, (total, count) in jepa.band_sums(token_loss, **batch.loss_counts()).items():
                    self.log.add(band, total, count=count)
                self.log.lap("backward")

            # 6. Optimizer and schedule, once per step
            values, learning_rate = self.update_weights()
            self.log.lap("optimizer")
            # 7. EMA, after the optimizer
            if self.target_encoder is not None:
                self.target_encoder.update(self.model.backbone)
            self.log.lap("ema")
            # 8. Log, monitor, checkpoint
            row = {"epoch": self.batches.epoch(step), "lr": learning_rate, "micro_batches": len(micro_batches)}
            health = self.check_health(step, values, pooled_rows, micro_batches)
            flops = step_flops(self.trained, **counts.sizes(), target=targets is not None) if cfg.peak_tflops else 0.0
            self.log.write(step, row | counts.metrics() | health, values, flops=flops)
            self.save_if_due(step)
        self.checkpoints.finish()

    def has_targets(self, step: int) -> bool:
        """Whether the target branch runs on a step."""
        cfg = self.cfg
        return cfg.jepa_weight > 0 and jepa.is_jepa_step(step, jepa_every=cfg.jepa_every, jepa_ratio=cfg.jepa_ratio)

    def embed_targets(self, micro_batches: list[MicroBatch], step: int) -> list[Tensor] | None:
        """Target embeddings of every micro-batch; None on a step without the target branch."""
        cfg = self.cfg
        if self.target_encoder is None or not self.has_targets(step):
            return None
        with self.ranks.autocast(self.compute_dtype):
            targets = [
                self.target_encoder.embed(
                    batch.target,
                    batch.target_ids,
                    batch.num_sequences,
                    visible=None if cfg.compile else batch.target_visible,  # one compiled layer for all
                    layer_norm=cfg.pooled_layer_norm,
                    mask=batch.attention_mask,
                    input_pos=batch.input_pos,
                )
                for batch in micro_batches
            ]
        if not cfg.shuffle_targets:
            return targets
        partners = jepa.shuffled_partners(cfg.global_batch_size, seed=cfg.seed, step=step)
        shuffled = self.gather(targets, micro_batches)[partners.to(self.ranks.device, non_blocking=True)]  # [G, D]
        return [shuffled[batch.batch_positions] for batch in micro_batches]

    def gather(self, rows: list[Tensor], micro_batches: list[MicroBatch]) -> Tensor:
        """Rows [S, D] of this rank's micro-batches as [G, D], in batch order, on every rank."""
        positions = torch.cat([batch.batch_positions for batch in micro_batches])
        return self.ranks.gather_rows(torch.cat(rows), positions, self.cfg.global_batch_size)

    def update_weights(self) -> tuple[dict[str, Tensor], float]:
        """Anchor, clip, step optimizer and schedule.

        Returns:
            The global losses and the gradient norm before clipping, still on the device, and the rate that was used.
        """
        penalty = 0.0 if self.anchor is None else training.full_tensor(self.anchor.add_gradient())
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        if self.optimizer_in_bwd is not None:
            norm = self.optimizer_in_bwd.pop_grad_norm()
        else:
            limit = self.cfg.clip_grad_norm or math.inf
            norm = nn.utils.clip_grad_norm_(self.trained.parameters(), limit, foreach=True)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        losses = self.log.reduce()
        loss = losses["diffusion_loss"] + self.cfg.jepa_weight * losses["jepa_loss"] + penalty
        return {"loss": loss} | losses | {"grad_norm": training.full_tensor(norm)}, learning_rate

    def check_health(
        self, step: int, losses: dict[str, Tensor], pooled_rows: list[Tensor], micro_batches: list[MicroBatch]
    ) -> dict[str, float]:
        """Feed the collapse monitor; its measures on monitored steps."""
        if self.monitor.collects(step):
            self.monitor.add(self.gather(pooled_rows, micro_batches))
        if not self.monitor.measures(step):
            return {}
        self.log.check(step, losses)
        health, warning = self.monitor.measure()
        if warning is not None:
            self.log.say(f"warning: step {step + 1}: {warning}")
        return health | {"target_cosine": 1 - float(losses["jepa_loss"])} if self.has_targets(step) else health

    def save_if_due(self, step: int) -> None:
        """Write the training state, if it is time to, or if the run is asked to stop, which it then does."""
        stopped_by = self.signals.agreed()
        if stopped_by or self.checkpoints.is_due(step + 1, num_steps=self.num_steps):
            self.save(step + 1)
        if stopped_by:
            self.checkpoints.finish()
            raise training.Stopped(stopped_by)

    def save(self, num_steps: int) -> None:
        """Write the training state after so many steps."""
        self.log.sync()
        numbers = self.state.numbers() | {"metrics": self.run.metrics.last_row}
        self.checkpoints.save(num_steps, self.state.tensors(), numbers)

    def export(self) -> None:
        """Write the models that the config asks for; if that fails, the training state, so that no step is lost."""
        online = training.trained_tensors(self.model)
        try:
            for part in EXPORTS[self.cfg.export]:
                names = self.run.missing(exports(self.cfg, part))  # what exists is from before an interruption
                stream = training.full_tensors(self.target_encoder.weights(online) if part == "target" else online)
                if not self.ranks.is_rank_zero:
                    deque(stream, maxlen=0)  # gathering takes part on every rank
                self.ranks.on_rank_zero(partial(self.write_export, part, names, stream))
        except (OSError, UserError) as error:
            try:
                self.save(self.num_steps)
                self.checkpoints.finish()
            except UserError as unsaved:
                raise LaunchError(f"the export failed: {error}. Nor was the training state saved: {unsaved}") from error
            raise LaunchError(
                f"the export failed: {error}. The training state of step {self.num_steps} is in "
                f"{self.run.checkpoints}; `dllm-jepa export {self.run.path} OUT` writes the model elsewhere"
            ) from error

    def write_export(self, part: str, names: list[str], stream: Iterator[tuple[str, Tensor]]) -> None:
        """Write a model as a Hugging Face directory, of LoRA as an adapter; on rank zero."""
        cfg, base = self.cfg, self.cfg.checkpoint_dir
        state = self.fingerprint | {"step": self.num_steps, "metrics": self.run.metrics.last_row}
        card = model_card(part, state, self.config_yaml)
        files = {"tokenizer": self.tokenizer, "card": card, "prompt": self.dataset.prompt}
        dtype = DTYPES[cfg.export_dtype or cfg.compute_dtype]
        try:
            adapters = {} if self.model.lora is None else dict(stream)
            for name in names:
                path = self.run.exports[name]
                if self.model.lora is None:
                    save_hf(self.model, path, base, dtype, weights=stream, **files)
                elif name == part:
                    save_merged(self.model, path, self.base.read, adapters, like=base, dtype=dtype, **files)
                else:
                    save_adapter(self.model, path, adapters, base=base, **files)
                self.log.say(f"wrote {path}")
        finally:
            deque(stream, maxlen=0)  # the other ranks go through all of it


def exports(cfg: Config, *parts: str) -> list[str]:
    """The directories that a run leaves of these parts, as `RunDirectory.exports` names them."""
    if not config.has_adapters(cfg.model):
        return [*parts]
    return [*(ADAPTERS[part] for part in parts), *(parts if cfg.export_merged else ())]


def stretches(cfg: Config) -> bool:
    """Whether the schedule is planned for all steps of the run, however many."""
    return cfg.lr_scheduler is not None and "num_training_steps" not in cfg.lr_scheduler.arguments


@config.parse
def recipe_main(cfg: Config) -> None:
    """Join the other ranks, claim the output directory, train, export."""
    with (
        training.Ranks.join(cfg.device, replicate=cfg.data_parallel_replicate_dim) as ranks,
        training.StopSignals(ranks) as signals,
        training.RunDirectory(
            cfg.output_dir, cfg.resume, ranks, checkpoints=cfg.checkpoint.directory, stretches=stretches(cfg)
        ) as run,
    ):
        if run.is_finished(cfg.max_steps, exports(cfg, *EXPORTS[cfg.export])):
            return
        recipe = DLLMJEPARecipe(cfg, ranks, run, signals)
        with recipe.cleanup:
            recipe.setup()
            recipe.train()
            recipe.export()


if __name__ == "__main__":
    recipe_main()
