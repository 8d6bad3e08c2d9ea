"""The whole objective against plain loops in double precision, that run every sequence alone on full logits.

The library computes norms, losses and pooling in fp32, whatever the type of the model. Here `exact` lets it use double
precision there, too: what then differs from the loops is wrong, not rounded.

Shape legend: T tokens of one sequence, D hidden, V vocabulary.
"""

import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchtune.config import instantiate

from dllm_jepa.config import TRAINING, find_recipes, load_config, with_defaults
from dllm_jepa.data import MicroBatch
from dllm_jepa.data._collate import collate
from dllm_jepa.jepa import (
    EMATargetEncoder,
    GlobalCounts,
    LossWeight,
    Predictor,
    StepSums,
    Views,
    ViewSampler,
    jepa_loss,
    masked_token_loss,
    masked_token_weights,
    pool,
    shuffled_partners,
    transformer_predictor,
)
from dllm_jepa.models import MaskedDiffusionLM
from dllm_jepa.models.dream import dream
from dllm_jepa.models.llada import llada

SIZES = {"vocab_size": 31, "embed_dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 20}
MASK_ID, PAD_ID = 30, 29
LENGTHS = [9, 2, 13, 4, 6, 17, 3]
# Micro-batches of a step: of one sequence, of several, and of none.
SPLITS = {"whole": [[0, 1, 2, 3, 4, 5, 6]], "split": [[4, 0, 6], [], [2], [5, 1, 3]]}
JEPA_WEIGHT = 0.5
FAMILIES = {"llada": llada, "dream": dream}

Sequence = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], Views]


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """`tensor.float()` gives double precision; only what is reported stays in fp32."""
    add = StepSums.add

    def add_in_fp32(sums: StepSums, diffusion: Tensor, alignment: Tensor, token_loss: Tensor, **fields: Tensor) -> None:
        add(sums, diffusion, alignment, token_loss.to(torch.float32), **fields)

    monkeypatch.setattr(Tensor, "float", Tensor.double)
    monkeypatch.setattr(StepSums, "add", add_in_fp32)


@dataclass
class Parts:
    """Everything with weights."""

    model: MaskedDiffusionLM
    predictor: Predictor
    target_encoder: EMATargetEncoder

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(nn.ModuleDict({"model": self.model, "predictor": self.predictor}).named_parameters())

    def take_gradients(self) -> dict[str, Tensor]:
        """The gradients of all trained weights (zero where there is none), removed."""
        gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.trained().items()}
        for param in self.trained().values():
            param.grad = None
        return gradients


def build_parts(family: str) -> Parts:
    """Random weights, the target encoder's different from the online ones; norm scales and biases random, too."""
    torch.manual_seed(0)
    model, other = (FAMILIES[family](**SIZES, max_seq_len=32) for _ in range(2))
    predictor = transformer_predictor(16, 20, num_layers=2)
    for module in (model, other, predictor):
        for param in module.parameters():
            nn.init.normal_(param, 1.0 if param.ndim == 1 else 0.0, 0.3)
    encoder = EMATargetEncoder(other.backbone, ema_decay=0.9)
    encoder.backbone.double()
    return Parts(model.double(), predictor.double(), encoder)


def draw_ratios(generator: np.random.Generator) -> tuple[float, float]:
    """Ratios that fp32 holds exactly."""
    return float(generator.choice([0.125, 0.25, 0.5])), 0.75


def draw_sequences(shift_logits: bool) -> list[Sequence]:
    generator = np.random.default_rng(0)
    sampler = ViewSampler(draw_ratios, exact_count=False, nested=False)
    drawn = []
    for index, length in enumerate(LENGTHS):
        tokens = generator.integers(0, 29, length)
        # Some have no prompt: there only the shift keeps the first token from being masked.
        maskable = np.arange(length) >= (index % 2) * (length // 3)
        maskable[0] &= not shift_logits
        drawn.append((tokens, maskable, sampler(tokens, maskable, mask_id=MASK_ID, seed=1, epoch=0, index=index)))
    return drawn


def pool_by_hand(hidden: Tensor, masked: npt.NDArray[np.bool_], layer_norm: bool) -> Tensor:
    """[T, D] to [D]."""
    total, count = torch.zeros_like(hidden[0]), 0
    for position in range(len(masked)):
        if not masked[position]:
            total, count = total + hidden[position], count + 1
    mean = total / count
    if not layer_norm:
        return mean
    centred = mean - mean.sum() / len(mean)
    return centred / ((centred * centred).sum() / len(mean) + 1e-5).sqrt()


def cosine_by_hand(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()


def losses_by_hand(
    parts: Parts,
    sequences: list[Sequence],
    *,
    loss_weight: LossWeight,
    layer_norm: bool,
    partners: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """L_diff and L_jepa of a global batch, sequence by sequence and token by token; no packing, no padding."""
    with torch.no_grad():
        targets = [
            pool_by_hand(parts.target_encoder.backbone(torch.from_numpy(views.target.tokens)[None])[0], views.target.masked, layer_norm)
            for _, _, views in sequences
        ]
    head = parts.model.head
    assert head is not None
    diffusion, alignment, num_masked = torch.zeros(()).double(), torch.zeros(()).double(), 0
    for number, (tokens, maskable, views) in enumerate(sequences):
        context = views.context
        hidden = parts.model.backbone(torch.from_numpy(context.tokens)[None])[0]  # [T, D]
        logits = hidden @ head.weight.T  # [T, V]
        token_losses = []
        for position, is_masked in enumerate(context.masked):
            if is_masked:
                scores = logits[position - 1 if parts.model.shift_logits else position]
                token_losses.append(scores.exp().sum().log() - scores[int(tokens[position])])
        if loss_weight == "mean":
            diffusion = diffusion + sum(token_losses, torch.zeros(())) / len(token_losses)
        elif loss_weight == "inverse_ratio":
            diffusion = diffusion + sum(token_losses, torch.zeros(())) / context.mask_ratio / int(maskable.sum())
        else:
            diffusion = diffusion + sum(token_losses, torch.zeros(()))
        num_masked += len(token_losses)
        pred = parts.predictor(pool_by_hand(hidden, context.masked, layer_norm)[None])[0]
        target = targets[number if partners is None else partners[number]]
        alignment = alignment + 1 - cosine_by_hand(pred, target)
    return diffusion / (num_masked if loss_weight == "token" else len(sequences)), alignment / len(sequences)


def losses_by_library(
    parts: Parts, micro_batches: list[MicroBatch], *, loss_weight: LossWeight, layer_norm: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same calls as a recipe; L_diff and L_jepa of each micro-batch in turn."""
    counts = GlobalCounts(
        sum(batch.num_sequences for batch in micro_batches), sum(len(batch.labels) for batch in micro_batches), 1, 1
    )
    for batch in micro_batches:
        packing = {"mask": batch.attention_mask, "input_pos": batch.input_pos}
        target = parts.target_encoder.embed(
            batch.target, batch.target_ids, batch.num_sequences, layer_norm=layer_norm, **packing
        )
        hidden, logits = parts.model(
            batch.context,
            attention_mask=batch.attention_mask,
            input_pos=batch.input_pos,
            logits_at=batch.masked_positions,
        )
        weights = masked_token_weights(loss_weight, counts, **batch.loss_counts())
        diffusion = (weights * masked_token_loss(logits, batch.labels)).sum()
        pred = parts.predictor(pool(hidden, batch.context_ids, batch.num_sequences, layer_norm=layer_norm))
        yield diffusion, jepa_loss(target, pred, counts)


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest entry of each gradient."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, f"the reference has no gradient at {name}"
        assert float((found[name] - gradient).abs().max()) <= tolerance * scale, name


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("layer_norm", [True, False], ids=["layer_norm", "no_layer_norm"])
@pytest.mark.parametrize("loss_weight", ["mean", "inverse_ratio", "token"])
def test_losses_and_gradients_equal_plain_loops(
    family: str, packed: bool, layer_norm: bool, loss_weight: LossWeight
) -> None:
    parts = build_parts(family)
    sequences = draw_sequences(parts.model.shift_logits)
    expected = losses_by_hand(parts, sequences, loss_weight=loss_weight, layer_norm=layer_norm)
    (expected[0] + JEPA_WEIGHT * expected[1]).backward()
    expected_gradients = parts.take_gradients()
    # 1 / (number of masked tokens) is the one number that stays in fp32.
    tolerance = 1e-6 if loss_weight == "token" else 1e-9

    for split in SPLITS.values():
        micro_batches = [collate([sequences[m] for m in members], members, pad_id=PAD_ID, packed=packed) for members in split]
        found = [0.0, 0.0]
        for losses in losses_by_library(parts, micro_batches, loss_weight=loss_weight, layer_norm=layer_norm):
            (losses[0] + JEPA_WEIGHT * losses[1]).backward()
            found = [total + loss.item() for total, loss in zip(found, losses, strict=True)]
        assert found[0] == pytest.approx(expected[0].item(), rel=tolerance)
        assert found[1] == pytest.approx(expected[1].item(), rel=1e-9)
        assert_gradients_close(parts.take_gradients(), expected_gradients, tolerance)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_backbone_and_predictor_and_never_the_target(family: str) -> None:
    parts = build_parts(family)
    sequences = draw_sequences(parts.model.shift_logits)
    batch = collate(sequences, range(len(sequences)), pad_id=PAD_ID, packed=True)

    def reached(which: int) -> set[str]:
        losses = next(losses_by_library(parts, [batch], loss_weight="mean", layer_norm=True))
        losses[which].backward()
        return {name for name, gradient in parts.take_gradients().items() if gradient.any()}

    everything = set(parts.trained())
    backbone = {name for name in everything if name.startswith("model.backbone.")}
    predictor = {name for name in everything if name.startswith("predictor.")}
    assert backbone and predictor
    assert reached(0) == everything - predictor
    assert reached(1) == backbone | predictor
    assert all(param.grad is None for param in parts.target_encoder.backbone.parameters())


@pytest.mark.usefixtures("exact")
def test_the_jepa_gradient_is_the_slope_with_the_target_held_still() -> None:
    """Central differences along a random direction, in the online weights and in the target's."""
    parts = build_parts("dream")
    sequences = draw_sequences(shift_logits=True)
    batch = collate(sequences, range(len(sequences)), pad_id=PAD_ID, packed=True)

    def loss() -> Tensor:
        diffusion, alignment = next(losses_by_library(parts, [batch], loss_weight="mean", layer_norm=True))
        return diffusion + JEPA_WEIGHT * alignment

    def slope(params: list[nn.Parameter], directions: list[Tensor], width: float = 1e-5) -> float:
        values = []
        for distance in (width, -2 * width, width):
            with torch.no_grad():
                for param, direction in zip(params, directions, strict=True):
                    param += distance * direction
                values.append(loss().item())
        return (values[0] - values[1]) / (2 * width)

    loss().backward()
    online = list(parts.trained().values())
    directions = [torch.randn_like(param) for param in online]
    predicted = sum(float((p.grad * d).sum()) for p, d in zip(online, directions, strict=True) if p.grad is not None)
    assert slope(online, directions) == pytest.approx(predicted, rel=1e-6)

    frozen = list(parts.target_encoder.backbone.parameters())
    assert abs(slope(frozen, [torch.randn_like(param) for param in frozen])) > 1e-3
    assert all(param.grad is None for param in frozen)


# The recipe itself, in this process.

SMALL: dict[str, Any] = {
    "model.vocab_size": 2000,
    "model.embed_dim": 16,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_kv_heads": 1,
    "model.mlp_dim": 24,
    "model.rope_base": 100.0,
    "global_batch_size": 6,
    "tokens_per_device": 128,
    "max_steps": 1,
    "export": "false",
    "monitor_every": 0,
}
DATASET = {"_component_": "dllm_jepa.data.regex_pairs", "num_pairs": 24, "eos_fill": 6}


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
    path = find_recipes()["dllm_jepa_full"]
    spec = importlib.util.spec_from_file_location("recipe_under_test", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipe = module.DLLMJEPAFullRecipe(with_defaults(cfg, TRAINING))
    recipe.setup()
    return recipe


def sequences_of_step(recipe: Any, step: int) -> list[Sequence]:
    """The sequences of the global batch in batch order, drawn here and not by the recipe."""
    cfg = recipe.cfg
    dataset = instantiate(
        cfg.dataset,
        recipe.tokenizer,
        max_seq_len=cfg.max_seq_len,
        shift_logits=recipe.model.shift_logits,
        progress=False,
    )
    sampler, drawn = instantiate(cfg.view_sampler), []
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
            "view_sampler": {"_component_": "dllm_jepa.jepa.fixed_ratio_views", "context_ratio": 0.25, "target_ratio": 0.75},
        },
        model___component_=f"dllm_jepa.models.{family}.{family}",
        packed=packed,
        loss_weight=loss_weight,
        shuffle_targets=shuffle_targets,
        pooled_layer_norm=layer_norm,
        jepa_weight=JEPA_WEIGHT,
        target_encoder__ema_decay=0.75,
    )
    torch.manual_seed(0)
    parts = Parts(recipe.model, recipe.trained["predictor"], recipe.target_encoder)
    for module in (parts.model, parts.predictor, parts.target_encoder.backbone):
        module.double()
        for param in module.parameters():
            nn.init.normal_(param, 1.0 if param.ndim == 1 else 0.0, 0.3)
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
    recipe.cleanup()


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
    recipe.cleanup()


class LargestTensor(TorchDispatchMode):
    """Notes the largest result of any operation, and which operations there were."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.name, self.names = 0, "", set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(str(func))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.numel() > self.numel:
                self.numel, self.name = leaf.numel(), f"{func} {tuple(leaf.shape)}"
        return result


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_never_holds_logits_of_every_token(tmp_path: Path, family: str, packed: bool) -> None:
    """No result of any operation, the backward's and the optimizer's included, has B * T * V numbers."""
    vocab_size: int = SMALL["model.vocab_size"]
    recipe = build_recipe(
        tmp_path,
        {"view_sampler": {"_component_": "dllm_jepa.jepa.fixed_ratio_views"}},
        model___component_=f"dllm_jepa.models.{family}.{family}",
        packed=packed,
        max_steps=2,
        monitor_every=1,
    )
    batches = [batch for step in range(2) for batch in recipe.batches.step(step)]
    limit = min(batch.context.numel() for batch in batches) * vocab_size
    with LargestTensor() as step:
        recipe.train()
    assert {"aten.embedding_dense_backward.default", "aten._foreach_lerp_.Scalar"} <= step.names
    assert any("_log_softmax_backward" in name for name in step.names)
    assert step.numel < limit, step.name

    # The guard can fail: the logits of every token are seen.
    with LargestTensor() as full:
        recipe.model.token_logits(batches[0].context)
    assert full.numel >= limit
    recipe.cleanup()
