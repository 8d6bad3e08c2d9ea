"""What fits a model into one GPU, on the CPU: the step in the backward pass, bf16, states of few bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.launching import assert_same_state, metrics, run_here, training_state, without_time

# One layer: torchao compiles its step for every shape. The embedding and the head, of 16,384 weights, are those whose
# state it quantizes; it leaves those below 4,096 alone.
TINY = ("model.num_layers=1", "model.mlp_dim=32", "predictor.num_layers=1")
SAVED = ("checkpoint={every_n_steps: 2, keep_last: null}", "lr_scheduler.num_training_steps=4", "max_steps=4")
IN_BACKWARD = ("clip_grad_norm=null", "optimizer_in_bwd=true")
BF16 = (
    "dtype=bf16",
    "target_encoder.dtype=bf16",
    "optimizer._component_=torchao.optim.AdamW8bit",
    "optimizer.bf16_stochastic_round=true",
)
LOW_BIT = {"AdamW4bit": (4, 128), "AdamWFp8": (8, 256)}  # bits, and weights that share a scale
QUANTIZED = [
    f"optimizer.model.{name}.weight.{state}"
    for name in ("backbone.tok_embeddings", "head")
    for state in ("exp_avg", "exp_avg_sq")
]


def num_levels(state: Tensor, block_size: int) -> int:
    """How many values there are, each in units of the largest of its block.

    At most 2 * 2**bits: a map of torchao has a one and no minus one, so that a negative largest value shifts all.
    """
    blocks = state.double().view(-1, block_size)
    blocks = blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-30)
    return len(torch.unique(blocks.mul(1e5).round()))


# The step in the backward pass


def test_a_step_in_the_backward_pass_is_the_same_step(tmp_path: Path) -> None:
    usual = run_here(tmp_path / "usual", *SAVED, "clip_grad_norm=null")
    in_backward = run_here(tmp_path / "in_backward", *SAVED, *IN_BACKWARD)
    assert without_time(in_backward) == without_time(usual)
    assert_same_state(tmp_path / "in_backward", tmp_path / "usual", 4)
    run_here(tmp_path / "resumed", *SAVED, *IN_BACKWARD, "max_steps=2")
    run_here(tmp_path / "resumed", *SAVED, *IN_BACKWARD, "resume=auto")
    assert without_time(metrics(tmp_path / "resumed")) == without_time(usual)
    assert_same_state(tmp_path / "resumed", tmp_path / "usual", 4)
    # What is compared has a gradient norm that clipping would have reached, and weights that move.
    assert max(row["grad_norm"] for row in usual) > 1
    clipped = run_here(tmp_path / "clipped", *SAVED, "clip_grad_norm=0.1")
    assert clipped[0]["grad_norm"] == usual[0]["grad_norm"]
    assert clipped[-1]["loss"] != usual[-1]["loss"]


@pytest.mark.parametrize("split", [("tokens_per_device=200",), ("tokens_per_device=200", "packed=false")])
def test_a_step_in_the_backward_pass_takes_one_micro_batch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: tuple[str, ...]
) -> None:
    assert run_here(tmp_path / "usual", *split, "max_steps=1")[0]["micro_batches"] > 1
    with pytest.raises(SystemExit) as exit_info:
        run_here(tmp_path / "run", *split, *IN_BACKWARD)
    assert exit_info.value.code == 1
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    assert "may split a step into several micro-batches" in message and "optimizer_in_bwd needs them in one" in message
    assert not (tmp_path / "run").exists()

    # With the number that it names the run starts, and it is the smallest such number.
    needed = int(message.split("raise it to ")[1].split(",")[0])
    assert run_here(tmp_path / "run", *split, *IN_BACKWARD, f"tokens_per_device={needed}", "max_steps=1")
    with pytest.raises(SystemExit):
        run_here(tmp_path / "less", *split, *IN_BACKWARD, f"tokens_per_device={needed - 1}", "max_steps=1")


# bf16 with stochastic rounding


def test_stochastic_rounding_goes_on_where_it_stopped(tmp_path: Path) -> None:
    rows = run_here(tmp_path / "whole", *TINY, *BF16, *SAVED, *IN_BACKWARD)
    run_here(tmp_path / "run", *TINY, *BF16, *SAVED, *IN_BACKWARD, "max_steps=2")
    run_here(tmp_path / "run", *TINY, *BF16, *SAVED, *IN_BACKWARD, "resume=auto")
    assert without_time(metrics(tmp_path / "run")) == without_time(rows)
    assert_same_state(tmp_path / "run", tmp_path / "whole", 4)
    state = training_state(tmp_path / "whole", 4)
    weights = {name for name in state if name.startswith(("trained.", "target."))}
    assert {state[name].dtype for name in weights} == {torch.bfloat16}
    assert all(1 < num_levels(state[name], 256) <= 2 * 2**8 for name in QUANTIZED)

    # Near the run in fp32.
    expected = run_here(tmp_path / "fp32", *TINY, *SAVED, *IN_BACKWARD)
    assert [row["loss"] for row in rows] == [pytest.approx(row["loss"], rel=2e-2) for row in expected]


# States of few bits


@pytest.mark.parametrize("name", list(LOW_BIT))
def test_states_of_few_bits_train_and_go_on(tmp_path: Path, name: str) -> None:
    settings = (*TINY, *SAVED, f"optimizer._component_=torchao.optim.{name}")
    with torch.compiler.set_stance("force_eager"):  # compiled steps are the test above, half a minute each
        rows = run_here(tmp_path / "whole", *settings)
        run_here(tmp_path / "run", *settings, "max_steps=2")
        run_here(tmp_path / "run", *settings, "resume=auto")
    assert without_time(metrics(tmp_path / "run")) == without_time(rows)
    assert_same_state(tmp_path / "run", tmp_path / "whole", 4)
    state = training_state(tmp_path / "whole", 4)
    bits, block_size = LOW_BIT[name]
    assert all(1 < num_levels(state[key], block_size) <= 2 * 2**bits for key in QUANTIZED)

    # Near AdamW, whose state they approximate; that of the small weights is not quantized.
    expected = run_here(tmp_path / "adamw", *TINY, *SAVED)
    exact = training_state(tmp_path / "adamw", 4)
    assert all(num_levels(exact[key], block_size) > 2 * 2**bits for key in QUANTIZED)
    assert [row["loss"] for row in rows] == [pytest.approx(row["loss"], rel=1e-2) for row in expected]
