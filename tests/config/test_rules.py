"""Rules on optimizers, adapters, float8 and averages, over the packaged configs and the package's own builders.

What each refuses, in one line that says what to do, and what is next to it and allowed.
"""

import shlex
import sys
from pathlib import Path

import pytest
import torch
from dllm_jepa_full import Config

from dllm_jepa.config import Component, Launch, load_config, rules

ONE, TWO, GPU, TWO_GPUS = Launch(), Launch(2, 2, 0), Launch(1, 1, 1), Launch(2, 2, 2)
FULL, LORA = "tiny", "tiny_lora"
WHOLE_AVERAGE = "dllm_jepa.jepa.ema_target_encoder"
ADAPTER_AVERAGE = "dllm_jepa.jepa.ema_adapter_target_encoder"
WIDE = "model.embed_dim=256 model.mlp_dim=256 model.quantize_base=true"
BF16 = "device=cuda compute_dtype=bf16"
IN_BWD = "optimizer_in_bwd=true clip_grad_norm=null"
ADAM_8BIT = "optimizer._component_=torchao.optim.AdamW8bit"
ROUNDED = f"{ADAM_8BIT} optimizer.bf16_stochastic_round=true"


def found(name: str, words: str, launch: Launch = ONE) -> list[str]:
    return Config.problems(load_config(["--config", name, *shlex.split(words)], Config), launch)


def warnings(words: str) -> list[str]:
    return Config.check(load_config(["--config", FULL, *words.split()], Config)).warnings()


@pytest.mark.parametrize(
    ("name", "words", "launch", "line"),
    [
        # Adapters; of what else a builder refuses, see the tests of the builders
        (LORA, "model.lora_rank=0", ONE, "model: lora_rank must be at least 1, got 0"),
        (
            *(LORA, f"{WIDE} model.use_dora=true", TWO),
            "model.use_dora: true with quantize_base: true on 2 processes ... start one process",
        ),
        (
            *(LORA, f"model.use_dora=true {BF16}", TWO_GPUS),
            "model.use_dora: true with compute_dtype: bf16 on 2 processes ... start one process",
        ),
        (LORA, "dtype=bf16", ONE, "dtype: bf16 with adapters (LoRA) ... set dtype: fp32"),
        (LORA, "l2_anchor_weight=0.1", ONE, "l2_anchor_weight: 0.1 with adapters (LoRA) ... set l2_anchor_weight: 0"),
        (LORA, IN_BWD, ONE, "optimizer_in_bwd: true with adapters (LoRA) ... set optimizer_in_bwd: false"),
        (LORA, "export_merged=true export=null", ONE, "export_merged: true, but export is null ... set export: online"),
        (FULL, "export_merged=true", ONE, "export_merged: true, but all weights are trained ... export_merged: false"),
        # The average
        (
            *(FULL, f"target_encoder._component_={ADAPTER_AVERAGE}", ONE),
            f"target_encoder._component_: {ADAPTER_AVERAGE}, but all weights are trained; take {WHOLE_AVERAGE}",
        ),
        (
            *(LORA, f"target_encoder._component_={WHOLE_AVERAGE}", ONE),
            f"target_encoder._component_: {WHOLE_AVERAGE}, but only adapters are trained; take {ADAPTER_AVERAGE}",
        ),
        (
            *(FULL, "target_encoder.dtype=bf16", TWO),
            "target_encoder.dtype: bf16 on 2 processes ... set target_encoder.dtype: fp32",
        ),
        (FULL, "target_encoder.ema_decay=1.0", ONE, "target_encoder.ema_decay: 1.0 given, must be ... [0, 1)"),
        (FULL, "predictor.num_layers=6", ONE, "predictor.num_layers: 6 given, must be ... [1, 5]"),
        # Optimizers
        (
            *(LORA, "optimizer='{_component_: torchao.optim.CPUOffloadOptimizer}'", ONE),
            "optimizer._component_: torchao.optim.CPUOffloadOptimizer is not offered ... take torchao.optim.AdamW8bit "
            "with optimizer_in_bwd: true",
        ),
        (
            *(FULL, f"{ADAM_8BIT} dtype=bf16", TWO),
            "optimizer._component_: torchao.optim.AdamW8bit with dtype: bf16 on 2 processes ... set dtype: fp32 with "
            "compute_dtype: bf16, or start one process",
        ),
        (
            *(FULL, ROUNDED, ONE),
            "optimizer.bf16_stochastic_round: true has no effect with dtype: fp32 ... set it to false, or dtype: bf16",
        ),
        (
            *(FULL, "optimizer_in_bwd=true", ONE),
            "optimizer_in_bwd: true together with clip_grad_norm: 1.0 ... set clip_grad_norm: null or optimizer_in_bwd",
        ),
        (
            *(FULL, f"{IN_BWD} l2_anchor_weight=1e-4", ONE),
            "optimizer_in_bwd: true together with l2_anchor_weight: 0.0001 ... set l2_anchor_weight: 0 or",
        ),
        (FULL, IN_BWD, TWO, "optimizer_in_bwd: true on 2 processes ... set optimizer_in_bwd: false"),
        # float8
        (
            *(FULL, "target_encoder.float8=true", ONE),
            "target_encoder.float8: true with device: cpu ... set target_encoder.float8: false",
        ),
        (
            *(FULL, "target_encoder.float8=true device=cuda", GPU),
            "target_encoder.float8: true with compute_dtype: fp32 ... set compute_dtype: bf16",
        ),
        (LORA, "target_encoder.float8=true", ONE, f"target_encoder.float8: {ADAPTER_AVERAGE} has no such argument"),
    ],
)
def test_a_problem_is_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str, words: str, launch: Launch, line: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    (got,) = found(name, words, launch)
    begin, *rest = line.split(" ... ")
    assert got.startswith(begin)
    assert all(part in got for part in rest)


@pytest.mark.parametrize(
    ("name", "words", "launch"),
    [
        (FULL, "", TWO),
        (LORA, f"{WIDE} model.use_dora=true export_merged=true", ONE),
        (LORA, f"{WIDE} {ADAM_8BIT}", TWO),
        (LORA, "model.use_dora=true", TWO),
        (LORA, BF16, TWO_GPUS),
        (LORA, "jepa_weight=0 predictor=null target_encoder=null", TWO),
        (FULL, f"{ROUNDED} dtype=bf16 target_encoder.dtype=bf16 l2_anchor_weight=1e-4", ONE),
        (FULL, ADAM_8BIT, TWO),
        (FULL, "dtype=bf16", TWO),
        (FULL, f"{IN_BWD} predictor.num_layers=5 target_encoder.float8=false", ONE),
    ],
)
def test_what_is_next_to_a_refusal_is_allowed(name: str, words: str, launch: Launch) -> None:
    assert found(name, words, launch) == []


def test_stochastic_rounding_is_for_one_process() -> None:
    lines = found(FULL, f"{ROUNDED} dtype=bf16", TWO)
    (line,) = (line for line in lines if line.startswith("optimizer.bf16_stochastic_round"))
    assert "true on 2 processes" in line and "set it to false and dtype: fp32" in line


def test_a_model_without_a_weight_to_train_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "frozen_parts.py").write_text(
        "import torch\ndef model():\n    return torch.nn.Linear(2, 2).requires_grad_(False)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = found(FULL, "model='{_component_: frozen_parts.model}'")
    assert line == "model: frozen_parts.model builds a model without a weight to train"


def test_problems_are_listed_together() -> None:
    words = (
        f"{WIDE} model.use_dora=true dtype=bf16 target_encoder._component_={WHOLE_AVERAGE} "
        "export_merged=perhaps optimizer.betas=0.9"
    )
    starts = ("optimizer.betas:", "export_merged:", "dtype:", "model.use_dora:", "target_encoder._component_:")
    for line, start in zip(found(LORA, words, TWO), starts, strict=True):
        assert line.startswith(start)


# float8 on the GPUs that are there


@pytest.mark.parametrize(
    ("capabilities", "refused"),
    [([(8, 9)], None), ([(10, 0)], None), ([(9, 0), (8, 6), (8, 9)], "8.6"), ([], None)],
)
def test_the_oldest_gpu_decides_about_float8(
    monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]], refused: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: pytest.fail("CUDA was started"))
    assert found(FULL, BF16, GPU) == []  # without float8, GPUs are not asked
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    lines = found(FULL, f"{BF16} target_encoder.float8=true", Launch(1, 1, len(capabilities)))
    if not capabilities:
        assert [line.partition(",")[0] for line in lines] == ["device: cuda"]
    elif refused is None:
        assert lines == []
    else:
        (line,) = lines
        assert f"target_encoder.float8: true on a GPU of compute capability {refused}" in line
        assert "needs 8.9 or more" in line and "set target_encoder.float8: false" in line


def test_float8_without_compile_is_warned_about() -> None:
    words = f"{BF16} target_encoder.float8=true"
    (line,) = warnings(words)
    assert "target_encoder.float8: true with compile: false" in line and "set compile: true" in line
    assert warnings(f"{words} compile=true") == []


def test_a_small_rate_on_bf16_weights_is_warned_about_unless_they_are_rounded_stochastically() -> None:
    (line,) = warnings("dtype=bf16 optimizer.lr=1e-5")
    assert line.startswith("dtype: bf16 with optimizer.lr 1e-05") and "round-to-nearest" in line and "fp32" in line
    for words in ("dtype=bf16 optimizer.lr=1e-4", "optimizer.lr=1e-5", f"{ROUNDED} dtype=bf16 optimizer.lr=1e-5"):
        assert warnings(words) == []


# The compiler


@pytest.mark.skipif(sys.platform != "linux", reason="the compilers of Linux")
@pytest.mark.parametrize(
    ("installed", "cxx", "is_there"),
    [("g++", None, True), ("c++", None, False), ("clang++", "clang++", True), ("g++", "/nowhere/g++", False)],
)
def test_low_bit_optimizers_need_the_compiler_that_torch_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: str, cxx: str | None, is_there: bool
) -> None:
    (tmp_path / installed).write_text("#!/bin/sh\n")
    (tmp_path / installed).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("TORCH_INDUCTOR_INSTALL_GXX", raising=False)
    if cxx is not None:
        monkeypatch.setenv("CXX", cxx)
    lines = list(rules.low_bit_optimizer_has_compiler(Component("torchao.optim.AdamW8bit"), ONE))
    assert (lines == []) == is_there
    if not is_there:
        assert f"compiles its step and needs a C++ compiler, but there is no '{cxx or 'g++'}' here" in lines[0]
        assert "install g++" in lines[0] and "CXX" in lines[0] and "take torch.optim.AdamW" in lines[0]
        assert list(rules.low_bit_optimizer_has_compiler(Component("torch.optim.AdamW"), ONE)) == []
        monkeypatch.setenv("TORCH_INDUCTOR_INSTALL_GXX", "1")  # then torch installs one
        assert list(rules.low_bit_optimizer_has_compiler(Component("torchao.optim.AdamW8bit"), ONE)) == []
