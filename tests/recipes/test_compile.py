"""torch.compile on every layer: the same run, and no compilation for every new number of tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launching import SMALL, SMALL_LORA, run_here


def captured_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("recipe", "base"), [("dllm_jepa_full", SMALL), ("dllm_jepa_lora", SMALL_LORA)])
def test_compiled_layers_give_the_same_run_and_no_graph_for_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, base: list[str]
) -> None:
    def run(name: str, *overrides: str) -> list[dict[str, Any]]:
        return run_here(tmp_path / name, *overrides, recipe=recipe, base=base)

    # This backend captures and differentiates the same graphs as inductor, without its minutes of code generation.
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run("short", "compile=true", "max_steps=2")
    in_two_steps = captured_graphs()
    torch._dynamo.reset()
    rows = run("compiled", "compile=true")
    assert len({row["tokens"] for row in rows}) > 3
    assert captured_graphs() - in_two_steps == in_two_steps > 0
    for row, reference in zip(rows, run("eager"), strict=True):
        for key in ("loss", "jepa_loss", "grad_norm"):
            assert row[key] == pytest.approx(reference[key], rel=1e-5), key
