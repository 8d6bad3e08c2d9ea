"""Every rule on float8: the configs that it refuses or warns of, and their allowed neighbours."""

from typing import Any

import pytest
import torch
from dllm_jepa.config._float8_rules import float8_capability, float8_on_gpu_in_bf16, float8_without_compile

from dllm_jepa.config import LORA, TRAINING, Launch, load_config, problems, warnings

COMPONENT = "dllm_jepa.jepa.ema_target_encoder"
FLOAT8 = {"_component_": COMPONENT, "float8": True}
OTHERS = [None, {"_component_": COMPONENT}, {"_component_": COMPONENT, "float8": False}]


GPUS: list[tuple[int, int]] = []


@pytest.fixture(autouse=True)
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs of the capabilities in GPUS."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", GPUS.__getitem__)


def on(*capabilities: tuple[int, int] | None) -> Launch:
    GPUS[:] = [capability for capability in capabilities if capability is not None]
    return Launch(1, 1, len(GPUS))


def assert_one_line(lines: list[str], *parts: str) -> None:
    (line,) = lines
    for part in parts:
        assert part in line


def test_the_cpu_is_refused() -> None:
    assert_one_line(
        float8_on_gpu_in_bf16(FLOAT8, "cpu", "fp32"),
        "target_encoder.float8: true with device: cpu",
        "needs a GPU of compute capability 8.9 or more",
        "set target_encoder.float8: false",
    )


def test_fp32_compute_is_refused() -> None:
    assert_one_line(
        float8_on_gpu_in_bf16(FLOAT8, "cuda", "fp32"),
        "target_encoder.float8: true with compute_dtype: fp32",
        "set compute_dtype: bf16 or target_encoder.float8: false",
    )
    assert float8_on_gpu_in_bf16(FLOAT8, "cuda", "bf16") == []


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6)])
def test_older_gpus_are_refused(capability: tuple[int, int]) -> None:
    assert_one_line(
        float8_capability(FLOAT8, "cuda", on(capability)),
        f"target_encoder.float8: true on a GPU of compute capability {capability[0]}.{capability[1]}",
        "needs 8.9 or more",
        "set target_encoder.float8: false",
    )


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_newer_gpus_are_allowed(capability: tuple[int, int]) -> None:
    assert float8_capability(FLOAT8, "cuda", on(capability)) == []


def test_what_other_rules_refuse_is_refused_once() -> None:
    """`device: cuda` without a GPU, and a run on the CPU beside an old GPU."""
    assert float8_capability(FLOAT8, "cuda", on(None)) == []
    assert float8_capability(FLOAT8, "cpu", on((8, 0))) == []


def test_the_warning_is_about_eager_products() -> None:
    assert_one_line(float8_without_compile(FLOAT8, False), "with compile: false", "set compile: true")
    assert float8_without_compile(FLOAT8, True) == []


@pytest.mark.parametrize("target_encoder", OTHERS)
def test_without_float8_nothing_is_said(target_encoder: dict[str, Any] | None) -> None:
    assert float8_on_gpu_in_bf16(target_encoder, "cpu", "fp32") == []
    assert float8_capability(target_encoder, "cuda", on((8, 0))) == []
    assert float8_without_compile(target_encoder, False) == []


def found(*overrides: str, launch: Launch) -> list[str]:
    return problems(load_config(["--config", "tiny", *overrides]), TRAINING, launch)


ON_CUDA = ("device=cuda", "compute_dtype=bf16", "target_encoder.float8=true")


def test_the_full_recipe_has_the_rules() -> None:
    assert_one_line(found("target_encoder.float8=true", launch=on(None)), "float8: true with device: cpu")
    assert_one_line(found(*ON_CUDA, launch=on((8, 0))), "capability 8.0")
    assert found(*ON_CUDA, launch=on((9, 0))) == []
    assert_one_line(
        found(*ON_CUDA[:2], "target_encoder.float8=1", launch=on((9, 0))), "target_encoder.float8: 1", "bool"
    )
    assert_one_line(warnings(load_config(["--config", "tiny", *ON_CUDA])), "compile: false")


def test_lora_has_no_float8() -> None:
    """Its target shares the frozen base with the online model."""
    cfg = load_config(["--config", "tiny_lora", "target_encoder.float8=true"])
    assert_one_line(
        problems(cfg, LORA, on((9, 0))),
        "target_encoder.float8: dllm_jepa.jepa.ema_adapter_target_encoder has no such argument",
    )


def test_the_oldest_gpu_decides() -> None:
    assert_one_line(float8_capability(FLOAT8, "cuda", on((9, 0), (8, 6), (8, 9))), "capability 8.6")


def test_gpus_are_asked_only_for_float8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The question starts CUDA in the process."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: pytest.fail("CUDA was started"))
    for target_encoder in OTHERS:
        assert float8_capability(target_encoder, "cuda", Launch(1, 1, 1)) == []
