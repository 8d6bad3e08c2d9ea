"""One step of the recipe, in this process: against plain loops in double precision, and what it must never hold."""

import importlib
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dllm_jepa.config import load_config, recipe_config
from dllm_jepa.jepa import LossWeight, shuffled_partners
from dllm_jepa.models._layers import BidirectionalAttention
from dllm_jepa.packing import PackedSequences
from dllm_jepa.training import Ranks, RunDirectory, StopSignals
from tests.numerics.plain_loops import Parts, Sequence, assert_gradients_close, losses_by_hand, use_double_precision

JEPA_WEIGHT = 0.5
EMBED_DIM = 16
FAMILIES = ["llada", "dream"]
SMALL: dict[str, Any] = {
    "model.vocab_size": 2000,
    "model.embed_dim": EMBED_DIM,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.mlp_dim": 24,
    "model.rope_base": 100.0,
    "global_batch_size": 6,
    "tokens_per_device": 128,
    "max_steps": 1,
    "export": "null",
    "monitor_every": 0,
}
DATASET = {"_component_": "dllm_jepa.data.regex_pairs", "num_pairs": 24, "eos_fill": 6}


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    use_double_precision(monkeypatch)


def build_recipe(output_dir: Path, cfg_parts: dict[str, Any] | None = None, **overrides: Any) -> Any:
    """The full recipe after setup, in one process.

    Args:
        output_dir: of the run.
        cfg_parts: whole sections to replace.
        **overrides: config keys; `__` stands for a dot.
    """
    settings = SMALL | {"output_dir": output_dir} | {key.replace("__", "."): value for key, value in overrides.items()}
    cfg: DictConfig = load_config(["--config", "tiny", *(f"{key}={value}" for key, value in settings.items())])
    for key, section in ({"dataset": DATASET} | (cfg_parts or {})).items():
        cfg[key] = section
    ranks = Ranks.join("cpu")
    run = RunDirectory(output_dir, "never", ranks)
    checked = recipe_config("dllm_jepa_full").check(cfg)
    recipe = importlib.import_module("dllm_jepa_full").DLLMJEPARecipe(checked, ranks, run, StopSignals(ranks))
    recipe.setup()
    return recipe


def sequences_of_step(recipe: Any, step: int) -> list[Sequence]:
    """The sequences of the global batch in batch order, drawn here and not by the recipe."""
    cfg = recipe.cfg
    dataset = cfg.dataset.build(
        tokenizer=recipe.tokenizer,
        max_seq_len=cfg.max_seq_len,
        shift_logits=recipe.model.shift_logits,
        progress=False,
    )
    sampler, drawn = cfg.view_sampler.build(), []
    for index in recipe.batches.samples(step):
        tokens, maskable = dataset[index]
        clean = tokens.astype(np.int64)
        views = sampler(clean, maskable, mask_id=recipe.tokenizer.mask_id, seed=cfg.seed, epoch=0, index=index)
        drawn.append((clean, maskable, views))
    return drawn


def snapshot(params: Iterator[nn.Parameter] | list[nn.Parameter]) -> list[Tensor]:
    return [param.detach().clone() for param in params]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("family", "packed", "loss_weight", "shuffle_targets", "layer_norm"),
    [
        ("llada", True, "mean", False, True),
        ("llada", False, "inverse_ratio", False, True),
        ("dream", True, "inverse_ratio", True, False),
        ("dream", False, "mean", True, True),
    ],
)
def test_a_step_of_the_recipe_moves_every_weight_as_the_loops_say(
    tmp_path: Path, family: str, packed: bool, loss_weight: LossWeight, shuffle_targets: bool, layer_norm: bool
) -> None:
    """Plain gradient descent at rate 1 in double precision: the move is the gradient. Then the average has moved."""
    recipe = build_recipe(
        tmp_path,
        {
            "optimizer": {"_component_": "torch.optim.SGD", "lr": 1.0},
            "lr_scheduler": None,
            "clip_grad_norm": None,
            "view_sampler": {
                "_component_": "dllm_jepa.jepa.fixed_ratio_views",
                "context_ratio": 0.25,
                "target_ratio": 0.75,
            },
        },
        model___component_=f"dllm_jepa.models.{family}.{family}",
        packed=packed,
        loss_weight=loss_weight,
        shuffle_targets=shuffle_targets,
        pooled_layer_norm=layer_norm,
        jepa_weight=JEPA_WEIGHT,
        target_encoder__ema_decay=0.75,
    )
    parts = Parts(recipe.model, recipe.trained["predictor"], recipe.target_encoder)
    for module in (parts.model, parts.predictor, parts.target_encoder.backbone):
        module.double()
    parts.randomize()
    averages = list(parts.target_encoder.backbone.parameters())
    start, average_start = snapshot(list(parts.trained().values())), snapshot(averages)

    partners = shuffled_partners(6, seed=recipe.cfg.seed, step=0).tolist() if shuffle_targets else None
    sequences = sequences_of_step(recipe, 0)
    diffusion, alignment = losses_by_hand(
        parts, sequences, loss_weight=loss_weight, layer_norm=layer_norm, partners=partners
    )
    (diffusion + JEPA_WEIGHT * alignment).backward()
    expected = parts.take_gradients()

    recipe.train()
    (row,) = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["micro_batches"] > 1
    assert row["diffusion_loss"] == pytest.approx(diffusion.item(), rel=1e-6)
    assert row["jepa_loss"] == pytest.approx(alignment.item(), rel=1e-6)
    assert row["loss"] == pytest.approx((diffusion + JEPA_WEIGHT * alignment).item(), rel=1e-6)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-9)
    assert row["masked_tokens"] == sum(int(views.context.masked.sum()) for _, _, views in sequences)
    assert row["tokens"] == sum(len(tokens) for tokens, _, _ in sequences)

    moved = {
        name: before - param.detach() for before, (name, param) in zip(start, parts.trained().items(), strict=True)
    }
    assert_gradients_close(moved, expected, 1e-9)
    for before, average, online in zip(average_start, averages, parts.model.backbone.parameters(), strict=True):
        torch.testing.assert_close(average, 0.75 * before + 0.25 * online, rtol=1e-12, atol=1e-12)
        assert average.grad is None
    recipe.cleanup.close()


def test_the_average_follows_the_weights_after_each_update(tmp_path: Path) -> None:
    """The closed form over the weights that every optimizer step left behind, beginning at the initial ones."""
    ema_decay, num_steps = 0.6, 4
    recipe = build_recipe(tmp_path, max_steps=num_steps, target_encoder__ema_decay=ema_decay)
    online = list(recipe.model.backbone.parameters())
    path = [snapshot(online)]
    recipe.optimizer.register_step_post_hook(lambda *_: path.append(snapshot(online)))
    recipe.train()
    assert len(path) == num_steps + 1
    for position, average in enumerate(recipe.target_encoder.backbone.parameters()):
        expected = ema_decay**num_steps * path[0][position].double()
        for k in range(1, num_steps + 1):
            expected = expected + (1 - ema_decay) * ema_decay ** (num_steps - k) * path[k][position].double()
        torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-7)
        assert not torch.equal(path[0][position], path[-1][position])
    recipe.cleanup.close()


class LargestTensors(TorchDispatchMode):
    """Notes the largest result of any operation and the most rows of scores over the vocabulary; and the operations."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.numel, self.name, self.scored, self.names = 0, "", 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.numel() > self.numel:
                self.numel, self.name = leaf.numel(), f"{func} {tuple(leaf.shape)}"
            # [D, V] is the head's weight, transposed for its product.
            if isinstance(leaf, Tensor) and leaf.shape[-1:] == (self.vocab_size,) and leaf.size(0) != EMBED_DIM:
                self.scored = max(self.scored, leaf.numel() // self.vocab_size)
        return result


@pytest.mark.parametrize(
    ("family", "packed", "context_ratio"),
    [("llada", True, 0.2), ("llada", False, 0.95), ("dream", True, 0.95), ("dream", False, 0.2)],
)
def test_a_training_step_scores_a_chunk_of_masked_tokens_at_a_time(
    tmp_path: Path, family: str, packed: bool, context_ratio: float
) -> None:
    """No result of any operation, the backward's and the optimizer's included, has B * T * V numbers, or more rows of
    scores than `logits_chunk_tokens`, however many tokens are masked."""
    vocab_size: int = SMALL["model.vocab_size"]
    views = {"context_ratio": context_ratio, "target_ratio": 0.97}
    recipe = build_recipe(
        tmp_path,
        {"view_sampler": {"_component_": "dllm_jepa.jepa.fixed_ratio_views", **views}},
        model___component_=f"dllm_jepa.models.{family}.{family}",
        packed=packed,
        max_steps=2,
        monitor_every=1,
        logits_chunk_tokens=5,
    )
    batches = [batch for step in range(2) for batch in recipe.batches.step(step)]
    assert max(len(batch.labels) for batch in batches) > 5
    limit = min(batch.context.numel() for batch in batches) * vocab_size
    with LargestTensors(vocab_size) as step:
        recipe.train()
    assert {"aten.embedding_dense_backward.default", "aten._foreach_lerp_.Scalar"} <= step.names
    assert step.numel < limit, step.name
    assert step.scored == 5

    # The guard can fail: the logits of every token are seen.
    with LargestTensors(vocab_size) as full:
        recipe.model.token_logits(batches[0].context)
    assert full.numel >= limit and full.scored == batches[0].context.numel()
    recipe.cleanup.close()


class Waits(TorchDispatchMode):
    """Notes operations after which the host needs a number of the device, or a shape that depends on one."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.is_on = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is torch.ops.aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        # Without the size of its result it adds up the repeats on the host.
        by_count = func is torch.ops.aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None
        if self.is_on and (by_mask or by_count or func.overloadpacket in WAITING):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))

    @contextmanager
    def off(self) -> Iterator[None]:
        self.is_on = False
        yield
        self.is_on = True


WAITING = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten._unique2,
    torch.ops.aten.bincount,
}


def like_varlen(q: Tensor, k: Tensor, v: Tensor, packing: PackedSequences) -> Tensor:
    """Stands for the kernel of GPUs, which is given bounds on the device: shapes and gradients, but no attention."""
    assert len(packing.cu_seqlens) and packing.max_seqlen
    return q + (k + v).repeat_interleave(q.size(1) // k.size(1), dim=1)


@pytest.mark.parametrize(
    ("family", "packed", "overrides"),
    [
        ("llada", True, {}),
        ("dream", True, {"jepa_every": 2, "l2_anchor_weight": 0.1}),
        ("dream", False, {"shuffle_targets": True}),
    ],
)
def test_between_logging_steps_nothing_waits_for_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], family: str, packed: bool
) -> None:
    """With the fused optimizer of GPU configs; the reference kernel of packed rows would read lengths."""
    overrides = {"model___component_": f"dllm_jepa.models.{family}.{family}", "packed": packed, **overrides}
    recipe = build_recipe(tmp_path, max_steps=6, log_every_n_steps=3, optimizer__fused=True, **overrides)
    for part in (*recipe.model.modules(), *recipe.target_encoder.backbone.modules()):
        if isinstance(part, BidirectionalAttention):
            part.packed_attention = like_varlen
    waits, reads, flush, to_list = Waits(), [], recipe.log.flush, Tensor.tolist

    def flush_aside() -> Any:
        with waits.off():
            return flush()

    def noted(tensor: Tensor) -> Any:  # on the CPU it dispatches nothing
        if threading.current_thread() is threading.main_thread() and waits.is_on:
            reads.append(tuple(tensor.shape))
        return to_list(tensor)

    monkeypatch.setattr(recipe.log, "flush", flush_aside)
    monkeypatch.setattr(Tensor, "tolist", noted)
    with waits:
        recipe.train()
        assert waits.found == reads == []
        # The guard can fail.
        float(recipe.model.backbone.norm.scale.sum())
        recipe.model.backbone.norm.scale.tolist()
    assert waits.found == ["aten._local_scalar_dense.default"] and reads == [(16,)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    recipe.cleanup.close()


def test_steps_without_the_target_branch(tmp_path: Path) -> None:
    """No alignment is reported that was not measured, and the target encoder goes on following."""
    recipe = build_recipe(tmp_path, max_steps=4, monitor_every=1, jepa_every=2)
    averages = list(recipe.target_encoder.backbone.parameters())
    moves: list[bool] = []
    before = snapshot(averages)
    for step in range(4):
        recipe.log._start_step, recipe.log._num_steps = step, step + 1
        recipe.train()
        moves.append(not torch.equal(before[0], averages[0]))
        before = snapshot(averages)
    assert moves == [True] * 4
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for row, aligned in zip(rows, (False, True, False, True), strict=True):
        assert (row["jepa_loss"] > 0) == aligned == ("target_cosine" in row)
        assert row["loss"] == pytest.approx(row["diffusion_loss"] + row["jepa_loss"], rel=1e-6)
        assert "effective_rank" in row
        if aligned:
            assert row["target_cosine"] == pytest.approx(1 - row["jepa_loss"])
    recipe.cleanup.close()
