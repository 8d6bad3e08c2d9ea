"""The computed memory of a step, against tensors that are really there."""

import functools
import gc
import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import to_nf4

from dllm_jepa import cli
from dllm_jepa.config import Launch, find_configs, load_config, recipe_config
from dllm_jepa.jepa import GlobalCounts, jepa_loss, masked_token_weights, pool
from dllm_jepa.memory import LiveStorages, MemoryTable, step_memory
from dllm_jepa.memory._simulation import _LikeCUDA, _update, micro_batch_peak, optimizer_state_bytes, stored_bytes
from dllm_jepa.models import MaskedDiffusionLM
from dllm_jepa.models._layers import BidirectionalAttention
from dllm_jepa.packing import PackedSequences
from tests.launching import ROOT

SMALL = (
    *("max_seq_len=32", "tokens_per_device=80", "model.num_layers=2"),
    "view_sampler={_component_: dllm_jepa.jepa.fixed_ratio_views}",
)
LORA = "model={_component_: dllm_jepa.models.llada.lora_llada, lora_attn_modules: [q_proj, v_proj], lora_rank: 4, %s}"
SIZES = "vocab_size: 512, embed_dim: 128, num_layers: 2, num_heads: 4, mlp_dim: 256"
ADAMW_8BIT = ("optimizer={_component_: torchao.optim.AdamW8bit, lr: 1e-3}",)


def config(*overrides: str, config: str = "tiny") -> Any:
    """A config as it is read, with what only a GPU or a file allows left unchecked."""
    cls = recipe_config("dllm_jepa_full")
    values = load_config(["--config", config, *SMALL, *overrides])
    return cls.model_validate_json(json.dumps(values))


@functools.cache
def table(*overrides: str, gpus: int = 1) -> MemoryTable:
    return step_memory(config(*overrides), gpus)


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def build(cfg: Any) -> tuple[MaskedDiffusionLM, nn.Module]:
    """Model and predictor with memory."""
    model = cfg.model.build()
    predictor = cfg.predictor.build(model.sizes.embed_dim, model.sizes.mlp_dim)
    return model, predictor


# The tracker


def test_a_storage_counts_from_birth_to_death() -> None:
    before = torch.zeros(100)
    with LiveStorages() as storages:
        first = before + 1  # 400 bytes
        view = first.view(10, 10)[2:].t()
        before.add_(1)
        assert (storages.live, storages.peak) == (400, 400)
        second = torch.cat((first, first))  # 800
        assert storages.live == 1200
        del first, second
        assert storages.live == 400  # the view holds it
        del view
        assert (storages.live, storages.peak) == (0, 1200)
    x = torch.zeros(1000, requires_grad=True)
    with LiveStorages() as storages:
        y = (x * 2).exp().sum()  # exp keeps its result for the backward pass
        assert storages.live == 4000 + 4
        y.backward()
        del y
    assert storages.live == 4000  # the gradient
    assert storages.peak == 2 * 4000 + 4 + 4  # result and its gradient; the sum and its own


def test_quantized_tensors_count_what_is_inside() -> None:
    weight = to_nf4(torch.ones(256, 64))
    inside = sum(getattr(weight, name).numel() * getattr(weight, name).element_size() for name in (
        "quantized_data", "scaler_mean", "quantization_factor", "quantized_scalers", "nf4"
    ))  # fmt: skip
    assert stored_bytes(weight) == inside < weight.numel()
    with LiveStorages() as storages:
        dense = weight.get_original_weight()
    assert storages.live == total_bytes([dense]) < storages.peak


# What lasts


@pytest.mark.parametrize(
    "overrides",
    [(), (*ADAMW_8BIT, "dtype=bf16"), ("optimizer={_component_: torch.optim.SGD}",)],
    ids=["adamw", "8bit bf16", "sgd"],
)
def test_lasting_rows_are_those_of_real_tensors(overrides: tuple[str, ...]) -> None:
    cfg = config(*overrides)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.dtype]
    model, predictor = (module.to(dtype) for module in build(cfg))
    target_encoder = cfg.target_encoder.build(model, lambda dtype: cfg.model.build().backbone)
    params = [*model.parameters(), *predictor.parameters()]
    optimizer = cfg.optimizer.build(params)
    for param in params:
        param.grad = torch.zeros_like(param)
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()

    def state(module: nn.Module) -> int:
        values = (value for param in module.parameters() for value in optimizer.state[param].values())
        return sum(stored_bytes(value) for value in values if isinstance(value, Tensor))

    found = table(*overrides)
    assert found.trained_weights == found.gradients == total_bytes(model.parameters())
    assert found.frozen_weights == found.anchor == found.gathered == 0
    assert found.target_encoder == total_bytes(target_encoder.backbone.parameters())
    assert found.optimizer_state == state(model)
    assert found.predictor == 2 * total_bytes(predictor.parameters()) + state(predictor)


def test_parts_that_only_some_runs_have() -> None:
    assert table().target_encoder == 2 * table("target_encoder.dtype=bf16").target_encoder > 0
    plain = table("jepa_weight=0", "l2_anchor_weight=0.1")
    assert plain.target_encoder == plain.predictor == 0
    assert plain.anchor == plain.trained_weights


@pytest.mark.parametrize("quantize", [False, True])
def test_adapters_are_trained_and_averaged_alone(quantize: bool) -> None:
    words = (LORA % f"quantize_base: {quantize}, {SIZES}", "compute_dtype=bf16")
    model, predictor = build(config(*words))
    found = table(*words)
    trained = [param for param in model.parameters() if param.requires_grad]
    frozen = [param for param in model.parameters() if not param.requires_grad]
    nf4 = sum(stored_bytes(param) for param in frozen if hasattr(param, "quantized_data"))
    dense = sum(param.numel() for param in frozen if not hasattr(param, "quantized_data"))
    assert bool(nf4) == quantize
    assert found.trained_weights == found.gradients == found.target_encoder == total_bytes(trained)
    assert found.frozen_weights == nf4 + 2 * dense
    assert found.predictor == 4 * total_bytes(predictor.parameters()) + 4 * len(list(predictor.parameters()))


def test_dequantized_weights_are_among_the_activations() -> None:
    dense, quantized = (
        table(LORA % f"quantize_base: {quantize}, {SIZES}", "compute_dtype=bf16") for quantize in (False, True)
    )
    largest = 128 * 256
    assert 2 * largest < quantized.activations - dense.activations < 64 * largest


# What comes and goes


def measured_peak(cfg: Any, *, with_logits: bool) -> int:
    """The peak of a second micro-batch of 32, 32 and 16 tokens, really run on the CPU."""
    (model, predictor), backbone = build(cfg), cfg.model.build().backbone.requires_grad_(False)
    if cfg.enable_activation_checkpointing:
        model.checkpoint_layers()
    packing = PackedSequences.from_lengths([32, 32, 16])
    tokens = torch.randint(0, 500, (1, 80))
    ids = torch.tensor([0] * 32 + [1] * 32 + [2] * 16)[None]
    positions = torch.cat([torch.arange(length) for length in (32, 32, 16)])[None]
    masked, ones = torch.arange(16), torch.ones(3, dtype=torch.int64)
    counts = GlobalCounts(3, 16, 80, 80, 32**2 + 32**2 + 16**2)
    weights = masked_token_weights(
        "mean", counts, sequence_of_masked=masked % 3, mask_ratio=ones, num_masked=ones, num_maskable=ones
    )
    scored = {"labels": masked, "token_weights": weights, "chunk_tokens": cfg.logits_chunk_tokens}

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=cfg.compute_dtype == "bf16")

    def micro_batch() -> None:
        with autocast(), torch.no_grad():
            target = pool(backbone(tokens, mask=packing, input_pos=positions), ids, 3)
        with autocast():
            hidden = model(tokens, attention_mask=packing, input_pos=positions)
            losses = [model.score(hidden, masked, **scored).weighted_sum] if with_logits else []
            losses.append(jepa_loss(target, predictor(pool(hidden, ids, 3).to(hidden.dtype)), counts))
        sum(losses).backward()

    micro_batch()
    for param in model.parameters():  # without logits the head has had none
        param.grad = torch.zeros_like(param)
    gc.collect()
    with LiveStorages() as storages:
        micro_batch()
    return storages.peak


@pytest.mark.parametrize(
    ("compute_dtype", "checkpointing", "with_logits"),
    [("fp32", False, True), ("fp32", True, False), ("bf16", False, False), ("bf16", True, True)],
)
def test_the_simulated_peak_is_the_measured_one(compute_dtype: str, checkpointing: bool, with_logits: bool) -> None:
    cfg = config(f"compute_dtype={compute_dtype}", f"enable_activation_checkpointing={checkpointing}")
    simulated = micro_batch_peak(cfg, 1, with_logits=with_logits)
    assert simulated == pytest.approx(measured_peak(cfg, with_logits=with_logits), rel=0.03)


def test_checkpointing_and_fewer_tokens_take_less() -> None:
    plain, recomputed, half = (
        table(f"enable_activation_checkpointing={on}", f"tokens_per_device={tokens}")
        for on, tokens in ((False, 4096), (True, 4096), (False, 2048))
    )
    assert recomputed.activations < 0.6 * plain.activations
    assert half.activations == pytest.approx(plain.activations / 2, rel=0.1)
    assert recomputed.lasting == plain.lasting == half.lasting
    padded = table("packed=false", "tokens_per_device=2048")  # of rows without a pad
    assert padded.activations == pytest.approx(half.activations, rel=0.1)


def test_a_gpu_takes_the_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the reference is not what a GPU runs")

    wide = ("compute_dtype=bf16", "enable_activation_checkpointing=true", "tokens_per_device=4096")
    cfg = config("device=cuda", *wide)
    on_cpu = micro_batch_peak(config(*wide), 1, with_logits=False)
    monkeypatch.setattr(BidirectionalAttention, "packed_attention", staticmethod(refuse))
    assert 0 < micro_batch_peak(cfg, 1, with_logits=False) < on_cpu


def test_a_norm_of_a_gpu_keeps_its_input_and_a_number_a_row() -> None:
    x = torch.zeros(100, 64, requires_grad=True)
    with LiveStorages() as storages, _LikeCUDA():
        out = F.rms_norm(x, (64,), eps=1e-5)
        assert storages.peak == storages.live == total_bytes([out]) + 100 * 4


def test_logits_are_those_of_the_highest_ratio() -> None:
    samplers = (
        "fixed_ratio_views, context_ratio: 0.1",
        "fixed_ratio_views, context_ratio: 0.4",
        "uniform_ratio_views, context_range: [0.0, 0.4]",
    )
    low, high, drawn = (
        table(
            f"view_sampler={{_component_: dllm_jepa.jepa.{sampler}}}", "tokens_per_device=2048", "model.vocab_size=8192"
        )
        for sampler in samplers
    )
    assert low.logits < high.logits
    assert drawn.logits == pytest.approx(high.logits, rel=0.02)


def test_logits_are_bounded_by_the_tokens_of_a_chunk() -> None:
    """Beside the head's gradient, which is made in any case."""
    wide = ("model.vocab_size=16384", "model.embed_dim=16", "model.mlp_dim=16")
    few, more, whole = (
        table(*wide, f"tokens_per_device={tokens}", f"logits_chunk_tokens={chunk}").logits
        for tokens, chunk in ((1024, 64), (2048, 64), (2048, 4096))
    )
    gradient, number = 4 * 16384 * 16, 4 * 16384
    assert 0 < more <= few < 65 * number + 2 * gradient
    assert whole - more > 100 * number


def test_the_optimizer_in_the_backward_pass_keeps_one_gradient() -> None:
    words = ("optimizer_in_bwd=true", "clip_grad_norm=null")
    kept, fused = table(), table(*words)
    assert fused.gradients == 4 * 512 * 128  # embedding or head
    assert fused.predictor == pytest.approx(kept.predictor * 3 / 4, rel=0.001)
    assert fused.optimizer_step == 0
    assert fused.total < kept.total
    during = kept.activations + kept.logits + fused.gradients + kept.optimizer_step
    assert fused.activations + fused.logits < during
    assert fused.gradients + fused.activations + fused.logits == micro_batch_peak(config(*words), 1, with_logits=True)


def test_an_update_in_the_backward_pass_has_temporaries_and_drops_the_gradient() -> None:
    param = nn.Parameter(torch.zeros(1000))
    param.grad = torch.zeros_like(param)
    with LiveStorages() as storages:
        _update(8.0, param)
    assert param.grad is None
    assert storages.peak == 8000


def test_the_target_branch_of_adapters_keeps_no_graph() -> None:
    lora = LORA % f"quantize_base: false, {SIZES}"
    with_target, without = (
        micro_batch_peak(config(lora, f"jepa_weight={weight}", "tokens_per_device=1024"), 1, with_logits=False)
        for weight in (1, 0)
    )
    assert with_target < 1.2 * without


# The optimizer's step


def test_a_large_parameter_that_blocks_do_not_divide_is_not_quantized() -> None:
    whole, odd = (optimizer_state_bytes(config(*ADAMW_8BIT), [size]) for size in (131_072, 131_073))
    assert odd == pytest.approx(8 * 131_073, rel=0.001)
    assert whole < 2.2 * 131_072


def test_steps_over_all_parameters_have_temporaries_of_all() -> None:
    adamw = "optimizer={_component_: torch.optim.AdamW, lr: 1e-3, %s}"
    each, foreach, fused = (
        table("device=cuda", adamw % mode) for mode in ("foreach: false", "fused: null", "fused: true")
    )
    weights = each.trained_weights + each.predictor // 4
    assert each.optimizer_step < foreach.optimizer_step
    assert foreach.optimizer_step == pytest.approx(weights, rel=0.1)
    assert fused.optimizer_step < 1000


def test_compiled_steps_hold_two_moments_in_fp32() -> None:
    assert table(*ADAMW_8BIT, "dtype=bf16").optimizer_step == 2 * 4 * 512 * 128


def test_the_total_is_the_larger_of_micro_batch_and_optimizer() -> None:
    parts = dict.fromkeys(MemoryTable.__dataclass_fields__, 1)
    assert MemoryTable(**parts).total == 7 + 3
    assert MemoryTable(**parts | {"optimizer_step": 5}).total == 7 + 5
    for step in (0, 5):
        *rows, (name, total) = MemoryTable(**parts | {"optimizer_step": step}).rows()
        assert (name, sum(size for _, size in rows)) == ("total", total)


# Several GPUs


def test_what_lasts_is_divided() -> None:
    one, four, replicated = (
        table(f"data_parallel_replicate_dim={copies}", gpus=gpus) for gpus, copies in ((1, 1), (4, 1), (4, 2))
    )
    for row in ("trained_weights", "gradients", "target_encoder"):
        assert getattr(one, row) == 4 * getattr(four, row) == 2 * getattr(replicated, row)
    for row in ("optimizer_state", "predictor"):  # with a step counter for each parameter
        assert getattr(one, row) == pytest.approx(4 * getattr(four, row), rel=0.01)
        assert getattr(one, row) == pytest.approx(2 * getattr(replicated, row), rel=0.01)
    assert one.gathered == 0 < four.gathered == replicated.gathered


def test_rows_that_do_not_divide_are_rounded_up() -> None:
    narrow = ("model.num_layers=1", "model.mlp_dim=30", "jepa_weight=0")
    model = config(*narrow).model.build()
    shards = [-(-param.size(0) // 8) * param[0].numel() for param in model.parameters()]
    assert table(*narrow, gpus=8).trained_weights == 4 * sum(shards) > total_bytes(model.parameters()) // 8


def test_gathered_are_root_two_layers_and_the_largest_gradient() -> None:
    layer = 4 * 128 * 128 + 3 * 128 * 384 + 2 * 128
    embedding, norm, head = 512 * 128, 128, 512 * 128
    predictor = 2 * 128 * 128 + 3 * 128 * 384 + 3 * 128
    assert table(gpus=2).gathered == 4 * (embedding + norm + 2 * layer) + 12 * max(head, predictor)
    bf16 = table("compute_dtype=bf16", "device=cuda", gpus=2).gathered
    assert bf16 == 2 * (embedding + norm + 2 * layer) + 8 * max(head, predictor)


# The command


def test_the_command_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["memory", "dllm_jepa_full", "--config", "tiny", "--gpus", "2", "max_seq_len=32", "tokens_per_device=80"])
    header, *lines = capsys.readouterr().out.splitlines()
    assert header == ("tiny on each of 2 GPUs: 80 tokens per micro-batch, trained weights in fp32, computing in fp32")
    rows = ("weights", "EMA target encoder", "gradients", "optimizer state")
    others = ("gathered layers (FSDP)", "activations", "logits", "total")
    assert [line.split("  ")[1] for line in lines] == [
        *rows, "predictor with its gradients and optimizer state", *others
    ]  # fmt: skip
    assert all(line.endswith(" GiB") for line in lines)


def test_paths_that_only_a_run_needs_may_be_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    text = (Path(__file__).parents[1] / "configs" / "tiny.yaml").read_text().replace("runs/tiny ", "??? ")
    path.write_text(text.replace("checkpoint_dir: null", "checkpoint_dir: ???"))
    cli.main(["memory", "dllm_jepa_full", "--config", str(path), "max_seq_len=32", "tokens_per_device=80"])
    assert capsys.readouterr().out.startswith(f"{path} on 1 GPU: 80 tokens")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "tiny", "modell=3"], "modell: unknown key"),
        (["--config", "tiny", "--gpus", "0"], "--gpus: 0 given, must be at least 1"),
        (["data_parallel_replicate_dim=2", "--config", "tiny", "--gpus", "3"], "data_parallel_replicate_dim: 2"),
    ],
)
def test_errors_are_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["memory", "dllm_jepa_full", *words])
    captured = capsys.readouterr()
    assert exit_.value.code == 1 and captured.out == ""
    assert captured.err.count("error: ") == 1 and message in captured.err


def test_the_runs_of_the_benchmark_are_valid() -> None:
    """They need a GPU, so that here only their configs can be checked."""
    spec = importlib.util.spec_from_file_location("memory_benchmark", ROOT / "benchmarks" / "memory.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert {name for name, _ in benchmark.RUNS} <= find_configs().keys()
    name = next(name for name, num_gpus in benchmark.RUNS if num_gpus == 1)
    cfg = load_config(["--config", name, "output_dir=run", *benchmark._GENERATED_DATA])
    assert recipe_config("dllm_jepa_full").problems(cfg, Launch(num_gpus=1)) == []
