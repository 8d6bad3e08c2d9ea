"""LoRA, DoRA and QLoRA fine-tuning of a masked diffusion language model with the DLLM-JEPA objective.

The base is frozen and shared by both branches: the target encoder is an average of the adapters alone. One process, or
any number of them with FSDP2:

    tune run dllm_jepa_lora --config tiny_lora
    tune run dllm_jepa_lora --config llada_8b_lora checkpoint_dir=LLaDA-8B-Base output_dir=runs/gsm8k_lora

To change it: `dllm-jepa cp dllm_jepa_lora my_recipe.py`, edit `train`, `tune run my_recipe.py --config ...`.

Shape legend: S sequences of a micro-batch, G of the global batch, n masked tokens, D hidden.
"""

import math
from contextlib import ExitStack
from dataclasses import asdict

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torchtune.config import instantiate

from dllm_jepa import config, training
from dllm_jepa.data import BatchPlan, MicroBatch, PrefetchedBatches, TrainingBatches, total_counts
from dllm_jepa.jepa import (
    CollapseMonitor,
    EMAAdapterTargetEncoder,
    GlobalCounts,
    StepSums,
    is_jepa_step,
    jepa_loss,
    masked_token_weights,
    pool,
    shuffled_partners,
)
from dllm_jepa.models import (
    HFCheckpoint,
    InitialWeights,
    LoRAWeights,
    MaskedDiffusionLM,
    choose_packed_attention,
    init_rope,
    model_card,
    save_adapter,
    save_merged,
    step_flops,
)

EXPORTS = {None: (), "online": ("online",), "target": ("target",), "both": ("online", "target")}
ADAPTERS = {"online": "adapter", "target": "adapter_target"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class DLLMJEPALoRARecipe:
    """Trains adapters of the online backbone, and a whole predictor, against an EMA of the adapters.

    Args:
        cfg: checked config; docs/configs.md lists its keys.
        ranks: the processes of the run.
        run: its output directory, and what it goes on from.
        signals: tells when it is asked to stop.
    """

    def __init__(
        self, cfg: DictConfig, ranks: training.Ranks, run: training.RunDirectory, signals: training.StopSignals
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
        saved = self.run.resume_from
        changes = [] if saved is None else config.check_resume(cfg, saved.config, config.LORA)
        self.tokenizer = instantiate(cfg.tokenizer)
        with torch.device("meta"):
            self.model: MaskedDiffusionLM = instantiate(cfg.model)
        self.origin = None if cfg.checkpoint_dir is None else HFCheckpoint(cfg.checkpoint_dir)
        if self.origin is not None:
            self.origin.check(self.model, mask_id=self.tokenizer.mask_id)
        self.model.check_fits(vocab_size=self.tokenizer.vocab_size, max_seq_len=cfg.max_seq_len)
        self.batches, steps_per_epoch, data = self.setup_batches()
        self.num_steps = cfg.max_steps or cfg.epochs * steps_per_epoch
        self.prefetched = PrefetchedBatches(self.batches, num_steps=self.num_steps, device=self.ranks.device)
        self.cleanup.callback(self.prefetched.close)
        self.run.check_steps(self.num_steps)
        model = {"family": self.model.family, "sizes": asdict(self.model.sizes), "lora": asdict(self.model.lora)}
        weights = f"random, seed {cfg.seed}" if self.origin is None else self.origin.fingerprint()
        base = {"base": cfg.checkpoint_dir, "base_weights": weights}
        self.facts = training.run_facts(self.ranks, seed=cfg.seed, model=model, data=data, **base)
        if self.run.resume_from is not None:
            training.check_trained(self.run.resume_from, "model", self.model)
            changes += training.compare_facts(self.run.resume_from.state, self.facts, override=cfg.resume_override)
        metric_logger = training.build_metric_logger(cfg.metric_logger, self.ranks)
        self.setup_model()
        self.trained = nn.ModuleDict({"model": self.model})
        self.target_encoder = None
        if cfg.jepa_weight > 0:
            self.target_encoder = self.setup_target_encoder()
            self.trained["predictor"] = self.setup_predictor()
        self.monitor = CollapseMonitor(
            monitor_every=cfg.monitor_every,
            global_batch_size=cfg.global_batch_size,
            embed_dim=self.model.sizes.embed_dim,
            device=self.ranks.device,
        )
        self.parts = {"target": self.target_encoder, "monitor": self.monitor}
        self.optimizer = instantiate(cfg.optimizer, [p for p in self.trained.parameters() if p.requires_grad])
        self.lr_scheduler = training.build_lr_scheduler(cfg.lr_scheduler, self.optimizer, num_steps=self.num_steps)
        self.setup_run(metric_logger, changes)

    def setup_batches(self) -> tuple[TrainingBatches, int, dict[str, str | int]]:
        """Tokenize the dataset and plan its batches; returns them, the steps of an epoch, and what tells the data."""
        cfg = self.cfg
        dataset = instantiate(
            cfg.dataset,
            self.tokenizer,
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
        )
        batches = TrainingBatches(
            dataset,
            plan,
            instantiate(cfg.view_sampler),
            rank=self.ranks.rank,
            seed=cfg.seed,
            mask_id=self.tokenizer.mask_id,
            pad_id=self.tokenizer.pad_id,
            packed=cfg.packed,
        )
        if self.ranks.is_rank_zero:
            print(f"{dataset}; {plan}")
        return batches, plan.steps_per_epoch, dataset.facts()

    def setup_model(self) -> None:
        """Wrap, shard and fill the online model: the base in the compute type or NF4, adapters that change nothing."""
        cfg = self.cfg
        if cfg.compile:
            self.model.compile_layers()
        if cfg.enable_activation_checkpointing:
            self.model.checkpoint_layers()
        training.shard(self.model, self.model.units, self.ranks, self.compute_dtype, kept=self.model.scorer)
        self.base = self.origin or InitialWeights(self.model, seed=cfg.seed, num_layers=self.model.sizes.num_layers)
        source = LoRAWeights(self.model, self.base, seed=cfg.seed, dtype=self.compute_dtype)
        training.materialize(
            self.model, source.read, dtype=DTYPES[cfg.dtype], frozen_dtype=self.compute_dtype, device=self.ranks.device
        )
        init_rope(self.model)

    def setup_target_encoder(self) -> EMAAdapterTargetEncoder:
        """Averages of the adapters, which take their places in the online model to embed."""
        return instantiate(self.cfg.target_encoder, self.model)

    def setup_predictor(self) -> nn.Module:
        """The predictor, with random weights."""
        sizes = self.model.sizes
        with torch.device("meta"):
            predictor: nn.Module = instantiate(self.cfg.predictor, sizes.embed_dim, sizes.mlp_dim)
        initial = InitialWeights(predictor, seed=self.cfg.seed, num_layers=self.cfg.predictor.get("num_layers", 1))
        training.shard(predictor, [], self.ranks, self.compute_dtype)
        training.materialize(predictor, initial.read, dtype=DTYPES[self.cfg.dtype], device=self.ranks.device)
        return predictor

    def setup_run(self, metric_logger: training.MetricLogger | None, changes: list[str]) -> None:
        """Go on from a training state, if there is one, and take the output directory into use."""
        cfg = self.cfg
        self.state = training.TrainingState(self.trained, self.optimizer, self.lr_scheduler, parts=self.parts)
        if self.run.resume_from is not None:
            self.state.load(self.run.resume_from, self.ranks, override=cfg.resume_override)
        self.config_yaml = OmegaConf.to_yaml(cfg, resolve=True)
        self.run.open(self.config_yaml, changes)
        self.log = training.RunLog(
            self.run,
            metric_logger,
            training.build_profiler(cfg.profiler),
            self.ranks,
            num_steps=self.num_steps,
            log_every_n_steps=cfg.log_every_n_steps,
            peak_tflops=cfg.peak_tflops,
            samples=self.batches.samples,
        )
        self.cleanup.callback(self.log.close)
        self.log.say(choose_packed_attention(self.model, self.ranks.device, self.compute_dtype))
        if metric_logger is not None:
            metric_logger.log_config(cfg)
        self.checkpoints = training.CheckpointWriter(
            self.run.checkpoints,
            self.ranks,
            config_yaml=self.config_yaml,
            facts=self.facts,
            every_n_steps=cfg.checkpoint.every_n_steps,
            keep_last=cfg.checkpoint.keep_last,
            keep_every=cfg.checkpoint.keep_every,
            async_save=cfg.checkpoint.async_save,
        )
        self.cleanup.callback(self.checkpoints.close)

    def train(self) -> None:
        """The loop."""
        cfg = self.cfg
        for step in self.log.steps():
            self.ranks.seed(cfg.seed, step)  # for dropout and stochastic rounding; views have seeds of their own
            # 1. Views: two maskings of the same sequences, for every micro-batch of this step
            micro_batches = [batch.to(self.ranks.device) for batch in self.prefetched.step(step)]
            counts = GlobalCounts(*self.ranks.sum_numbers(total_counts(micro_batches)))
            self.log.lap("data")

            # 2. Target embeddings, one [S, D] a micro-batch: EMA weights, no gradient, no head
            targets = self.embed_targets(micro_batches, step)
            self.log.lap("target")

            sums, pooled_rows = StepSums(self.ranks.device), []
            for index, batch in enumerate(micro_batches):
                weights = masked_token_weights(cfg.loss_weight, counts, **batch.loss_counts())  # [n]
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
                    loss, alignment_loss = diffusion_loss, torch.zeros_like(diffusion_loss)
                    if targets is not None or self.monitor.collects(step):
                        pooled = pool(hidden, batch.context_ids, batch.num_sequences, layer_norm=cfg.pooled_layer_norm)
                        pooled_rows.append(pooled.detach())
                    if targets is not None:
                        pred = self.trained["predictor"](pooled.to(hidden.dtype))
                        alignment_loss = jepa_loss(targets[index], pred, counts)
                        loss = diffusion_loss + cfg.jepa_weight * alignment_loss
                self.log.lap("forward")
                # 5. Backward
                loss.backward()
                sums.add(diffusion_loss, alignment_loss, token_loss, **batch.loss_counts())
                self.log.lap("backward")

            # 6. Optimizer and schedule, once per step
            values, learning_rate = self.update_weights(sums)
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

    def aligns(self, step: int) -> bool:
        """Whether the target branch runs on a step."""
        cfg = self.cfg
        return cfg.jepa_weight > 0 and is_jepa_step(step, jepa_every=cfg.jepa_every, jepa_ratio=cfg.jepa_ratio)

    def embed_targets(self, micro_batches: list[MicroBatch], step: int) -> list[Tensor] | None:
        """Target embeddings of every micro-batch; None on a step without the target branch."""
        cfg = self.cfg
        if self.target_encoder is None or not self.aligns(step):
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
        partners = shuffled_partners(cfg.global_batch_size, seed=cfg.seed, step=step)
        shuffled = self.gather(targets, micro_batches)[partners.to(self.ranks.device, non_blocking=True)]  # [G, D]
        return [shuffled[batch.batch_positions] for batch in micro_batches]

    def gather(self, rows: list[Tensor], micro_batches: list[MicroBatch]) -> Tensor:
        """Rows [S, D] of this rank's micro-batches as [G, D], in batch order, on every rank."""
        positions = torch.cat([batch.batch_positions for batch in micro_batches])
        return self.ranks.gather_rows(torch.cat(rows), positions, self.cfg.global_batch_size)

    def update_weights(self, sums: StepSums) -> tuple[dict[str, Tensor], float]:
        """Clip, step optimizer and schedule.

        Returns:
            The global losses and the gradient norm before clipping, still on the device, and the rate that was used.
        """
        learning_rate = float(self.optimizer.param_groups[0]["lr"])
        limit = self.cfg.clip_grad_norm or math.inf
        norm = nn.utils.clip_grad_norm_(self.trained.parameters(), limit, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.lr_scheduler is not None:
            self.lr_scheduler.step()
        self.ranks.sum(sums.values)
        losses = sums.losses(jepa_weight=self.cfg.jepa_weight)
        return losses | {"grad_norm": training.full_tensor(norm)}, learning_rate

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
        return health | {"target_cosine": 1 - float(losses["jepa_loss"])} if self.aligns(step) else health

    def save_if_due(self, step: int) -> None:
        """Write the training state, if it is time to, or if the run is asked to stop, which it then does."""
        stopped_by = self.signals.agreed()
        if stopped_by or self.checkpoints.is_due(step + 1, num_steps=self.num_steps):
            self.log.sync()
            numbers = self.state.numbers() | {"metrics": self.run.metrics.last_row}
            self.checkpoints.save(step + 1, self.state.tensors(), numbers)
        if stopped_by:
            self.checkpoints.finish()
            raise training.Stopped(stopped_by)

    def export(self) -> None:
        """Write the adapters that the config asks for, and the models that they make of their base."""
        cfg, base = self.cfg, self.cfg.checkpoint_dir
        parts = {"online": training.trained_tensors(self.model)}
        if self.target_encoder is not None:
            parts["target"] = self.target_encoder.tensors()
        state = self.facts | {"step": self.num_steps, "metrics": self.run.metrics.last_row}
        missing = self.run.missing(exports(cfg))  # what exists is from before an interruption between two
        for part in EXPORTS[cfg.export]:
            adapters = dict(training.full_tensors(parts[part]))  # gathering takes part on every rank
            if not self.ranks.is_rank_zero:
                continue
            files = {"tokenizer": self.tokenizer, "card": model_card(part, state, self.config_yaml)}
            if ADAPTERS[part] in missing:
                path = self.run.exports[ADAPTERS[part]]
                save_adapter(self.model, path, adapters, base=base, **files)
                self.log.say(f"wrote {path}")
            if part in missing:
                path, dtype = self.run.exports[part], DTYPES[cfg.export_dtype or cfg.compute_dtype]
                save_merged(self.model, path, self.base.read, adapters, like=cfg.checkpoint_dir, dtype=dtype, **files)
                self.log.say(f"wrote {path}")


def exports(cfg: DictConfig) -> list[str]:
    """The directories that a run leaves, as `RunDirectory.exports` names them."""
    parts = EXPORTS[cfg.export]
    return [*(ADAPTERS[part] for part in parts), *(parts if cfg.export_merged else ())]


@config.parse(schema=config.LORA)
def recipe_main(cfg: DictConfig) -> None:
    """Join the other ranks, claim the output directory, train, export."""
    with (
        training.Ranks.join(cfg.device, replicate=cfg.data_parallel_replicate_dim) as ranks,
        training.StopSignals(ranks) as signals,
        training.RunDirectory(cfg.output_dir, cfg.resume, ranks, checkpoints=cfg.checkpoint.directory) as run,
    ):
        if run.is_finished(cfg.max_steps, exports(cfg)):
            return
        recipe = DLLMJEPALoRARecipe(cfg, ranks, run, signals)
        with recipe.cleanup:
            recipe.setup()
            recipe.train()
            recipe.export()


if __name__ == "__main__":
    recipe_main()
