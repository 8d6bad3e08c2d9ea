"""Every rule on the optimizer: the configs that it refuses, and their allowed neighbours."""

import ast
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from dllm_jepa.config._optimizer_rules import (
    low_bit_optimizer_has_compiler,
    low_bit_optimizer_on_sharded_bf16,
    no_offloaded_optimizer,
    optimizer_in_bwd_in_one_process,
    optimizer_in_bwd_is_legal,
    stochastic_round_in_one_process,
    stochastic_round_needs_bf16,
)
from torch._inductor.cpp_builder import cpp_compiler_search
from torch._inductor.exc import InvalidCxxCompiler

from dllm_jepa.config import Launch

LOW_BIT = ["Adam8bit", "Adam4bit", "AdamFp8", "AdamW8bit", "AdamW4bit", "AdamWFp8"]
OFFLOADED = ["torchao.optim.CPUOffloadOptimizer", "torchao.optim.cpu_offload.CPUOffloadOptimizer"]
ONE, FOUR = Launch(), Launch(4, 4, 4)


def named(component: str, **arguments: Any) -> dict[str, Any]:
    return {"_component_": component, "lr": 1e-5, **arguments}


def assert_one_line(lines: list[str], *parts: str) -> None:
    (line,) = lines
    for part in parts:
        assert part in line


@pytest.mark.parametrize("name", LOW_BIT)
def test_low_bit_state_of_sharded_bf16_weights_is_refused(name: str) -> None:
    optimizer = named(f"torchao.optim.{name}")
    assert_one_line(
        low_bit_optimizer_on_sharded_bf16(optimizer, "bf16", FOUR),
        f"optimizer._component_: torchao.optim.{name} with dtype: bf16 on 4 processes",
        "set dtype: fp32 with compute_dtype: bf16",
        "start one process",
    )
    assert low_bit_optimizer_on_sharded_bf16(optimizer, "fp32", FOUR) == []
    assert low_bit_optimizer_on_sharded_bf16(optimizer, "bf16", ONE) == []


def test_other_optimizers_of_sharded_bf16_weights_are_allowed() -> None:
    assert low_bit_optimizer_on_sharded_bf16(named("torch.optim.AdamW"), "bf16", FOUR) == []


def test_stochastic_rounding_is_for_one_process() -> None:
    rounded = named("torchao.optim.AdamW8bit", bf16_stochastic_round=True)
    assert_one_line(
        stochastic_round_in_one_process(rounded, FOUR),
        "optimizer.bf16_stochastic_round: true on 4 processes",
        "set it to false",
        "dtype: fp32",
    )
    assert stochastic_round_in_one_process(rounded, ONE) == []
    assert stochastic_round_in_one_process(rounded | {"bf16_stochastic_round": False}, FOUR) == []
    assert stochastic_round_in_one_process(named("torch.optim.AdamW"), FOUR) == []


def test_stochastic_rounding_is_for_bf16_weights() -> None:
    rounded = named("torchao.optim.AdamW8bit", bf16_stochastic_round=True)
    assert_one_line(
        stochastic_round_needs_bf16(rounded, "fp32"),
        "optimizer.bf16_stochastic_round: true has no effect with dtype: fp32",
        "set it to false, or dtype: bf16",
    )
    assert stochastic_round_needs_bf16(rounded, "bf16") == []
    assert stochastic_round_needs_bf16(rounded | {"bf16_stochastic_round": False}, "fp32") == []
    assert stochastic_round_needs_bf16(named("torch.optim.AdamW"), "fp32") == []


# The compiler


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing on its path but what a test puts into this folder."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("TORCH_INDUCTOR_INSTALL_GXX", raising=False)
    return tmp_path


def install(folder: Path, name: str) -> None:
    (folder / name).write_text("#!/bin/sh\n")
    (folder / name).chmod(0o755)


def inductor_finds_a_compiler() -> bool:
    """What torch itself says. Its config reads the environment at import, so that line of its source is run again."""
    tree = ast.parse(Path(torch._inductor.config.__file__).read_text())
    (line,) = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign) and node.value is not None and ast.unparse(node.target) == "cxx"
    ]
    search = eval(ast.unparse(line), {"os": os, "sys": sys})
    cpp_compiler_search.cache_clear()
    try:
        return bool(cpp_compiler_search(search))
    except InvalidCxxCompiler:
        return False
    finally:
        cpp_compiler_search.cache_clear()


@pytest.mark.parametrize("name", LOW_BIT)
def test_low_bit_optimizers_need_a_compiler(name: str, bare_machine: Path) -> None:
    optimizer = named(f"torchao.optim.{name}")
    default = "clang++" if sys.platform == "darwin" else "g++"
    assert_one_line(
        low_bit_optimizer_has_compiler(optimizer),
        f"optimizer._component_: torchao.optim.{name} compiles",
        f"no '{default}' here",
        "install g++",
        "CXX",
        "take torch.optim.AdamW",
    )
    install(bare_machine, default)
    assert low_bit_optimizer_has_compiler(optimizer) == []


def test_other_optimizers_need_no_compiler(bare_machine: Path) -> None:
    assert low_bit_optimizer_has_compiler(named("torch.optim.AdamW")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the compilers of Linux")
@pytest.mark.parametrize("installed", ["g++", "clang++", "c++", None])
@pytest.mark.parametrize("cxx", ["clang++", "/nowhere/g++", None])
def test_it_is_the_compiler_that_torch_finds(
    installed: str | None, cxx: str | None, bare_machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed is not None:
        install(bare_machine, installed)
    if cxx is not None:
        monkeypatch.setenv("CXX", cxx)
    allowed = low_bit_optimizer_has_compiler(named("torchao.optim.AdamW8bit")) == []
    assert allowed == inductor_finds_a_compiler()
    assert allowed == (installed is not None and installed == (cxx if cxx is not None else "g++"))


def test_a_compiler_that_torch_installs_is_allowed(bare_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_INDUCTOR_INSTALL_GXX", "1")
    assert low_bit_optimizer_has_compiler(named("torchao.optim.AdamW8bit")) == []


# Offloading, and the step within the backward pass


@pytest.mark.parametrize("path", OFFLOADED)
def test_the_offloaded_optimizer_is_refused(path: str) -> None:
    module, _, name = path.rpartition(".")
    assert getattr(importlib.import_module(module), name).__name__ == "CPUOffloadOptimizer"
    assert_one_line(
        no_offloaded_optimizer(named(path)),
        f"optimizer._component_: {path} is not offered",
        "its own copy of the weights",
        "no state by parameter",
        "take torchao.optim.AdamW8bit with optimizer_in_bwd: true",
    )
    # One line is enough: it neither compiles nor keeps a state of few bits.
    assert low_bit_optimizer_on_sharded_bf16(named(path), "bf16", FOUR) == []


@pytest.mark.parametrize("path", ["torchao.optim.AdamW8bit", "torch.optim.AdamW"])
def test_optimizers_on_the_gpu_are_allowed(path: str) -> None:
    assert no_offloaded_optimizer(named(path)) == []


def test_the_step_within_backward_allows_nothing_in_between() -> None:
    assert_one_line(
        optimizer_in_bwd_is_legal(True, 1.0, 0),
        "optimizer_in_bwd: true together with clip_grad_norm: 1.0",
        "set clip_grad_norm: null or optimizer_in_bwd: false",
    )
    assert_one_line(
        optimizer_in_bwd_is_legal(True, None, 1e-4),
        "optimizer_in_bwd: true together with l2_anchor_weight: 0.0001",
        "set l2_anchor_weight: 0 or",
    )
    assert len(optimizer_in_bwd_is_legal(True, 1.0, 1e-4)) == 2
    assert optimizer_in_bwd_is_legal(True, None, 0) == []
    assert optimizer_in_bwd_is_legal(False, 1.0, 1e-4) == []


def test_the_step_within_backward_is_for_one_process() -> None:
    assert_one_line(
        optimizer_in_bwd_in_one_process(True, FOUR),
        "optimizer_in_bwd: true on 4 processes",
        "set optimizer_in_bwd: false",
        "start one process",
    )
    assert optimizer_in_bwd_in_one_process(True, ONE) == []
    assert optimizer_in_bwd_in_one_process(False, FOUR) == []
