"""torch.compile on every layer: the same run, and hardly a recompilation, whatever the numbers of rows and tokens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.optimizer import register_optimizer_step_post_hook

from dllm_jepa.models import set_packed_attention
from dllm_jepa.models.llada import llada
from dllm_jepa.packing import PackedSequences
from tests.launching import SMALL, SMALL_LORA, run_here

# Recompilations of a run: each piece of a layer once for each of two grad modes, or once for single rows.
FEWER_THAN = 5
LENGTHS = [[5, 7], [3, 4, 9], [8, 8], [2, 2], [30, 1, 1, 5], [12, 13, 14, 15]]


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, int]]:
    """Compiled pieces of code, and compilations of one of them again, so far."""
    # This backend captures and differentiates the same graphs as inductor, without its minutes of code generation.
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.utils.clear_compilation_metrics()

    def count() -> tuple[int, int]:
        ids = {metrics.compile_id for metrics in torch._dynamo.utils.get_compilation_metrics()}
        tries = [int(str(number).partition("/")[2].partition("_")[0]) for number in ids if number is not None]
        return sum(attempt == 0 for attempt in tries), sum(attempt > 0 for attempt in tries)

    return count


@pytest.mark.parametrize(
    ("recipe", "base", "packed"),
    [
        ("dllm_jepa_full", SMALL, True),
        ("dllm_jepa_lora", SMALL_LORA, False),
    ],
)
def test_compiled_layers_give_the_same_run_and_compile_nothing_after_its_first_step(
    tmp_path: Path, compilations: Callable[[], tuple[int, int]], recipe: str, base: list[str], packed: bool
) -> None:
    def run(name: str, *overrides: str) -> list[dict[str, Any]]:
        return run_here(tmp_path / name, f"packed={packed}", *overrides, recipe=recipe, base=base)

    after_steps: list[tuple[int, int]] = []
    hook = register_optimizer_step_post_hook(lambda *_: after_steps.append(compilations()))
    try:
        rows = run("compiled", "compile=true")
    finally:
        hook.remove()
    assert len(after_steps) == len(rows) and len({row["tokens"] for row in rows}) >= 5
    pieces, again = compilations()
    assert pieces > 0 and again < FEWER_THAN
    assert after_steps[0] == (pieces, again)
    for row, reference in zip(rows, run("eager"), strict=True):
        for key in ("loss", "jepa_loss", "grad_norm"):
            assert row[key] == pytest.approx(reference[key], rel=1e-5), key


def compiled_backbone(*, checkpointing: bool, device: str) -> Module:
    with torch.device(device):
        backbone = llada(vocab_size=64, embed_dim=32, num_layers=2, num_heads=4, mlp_dim=48, max_seq_len=64).backbone
    backbone.compile_layers()
    if checkpointing:
        backbone.checkpoint_layers()
    return backbone


@pytest.mark.parametrize(
    ("rows", "checkpointing"),
    [("packed", False), ("packed", True), ("varlen", False), ("varlen", True), ("padded", True)],
)
def test_hardly_a_recompilation(
    compilations: Callable[[], tuple[int, int]], monkeypatch: pytest.MonkeyPatch, rows: str, checkpointing: bool
) -> None:
    """A target without gradients, an online model, and one whose embedding is frozen.

    The kernel of GPUs on the meta device, without a graph break.
    """
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")  # the guards are those of the capture
    device, dtype = ("meta", torch.bfloat16) if rows == "varlen" else ("cpu", torch.float32)
    online, target = (compiled_backbone(checkpointing=on, device=device).to(dtype) for on in (checkpointing, False))
    target.requires_grad_(False)
    if rows == "varlen":
        set_packed_attention(online, "varlen")
        set_packed_attention(target, "varlen")

    def run(lengths: list[int]) -> None:
        shape = (len(lengths), max(lengths)) if rows == "padded" else (1, sum(lengths))
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        real = torch.arange(shape[1], device=device) < torch.tensor(lengths, device=device)[:, None]
        mask = real if rows == "padded" else PackedSequences.from_lengths(lengths).to(tokens.device)
        with torch.no_grad():
            target(tokens, mask=mask, input_pos=tokens)
        online(tokens, mask=mask, input_pos=tokens).sum().backward()

    for frozen in (False, True):
        online.get_submodule("tok_embeddings").requires_grad_(not frozen)
        for lengths in LENGTHS:
            run(lengths)
        compiled, again = compilations()
        assert compiled > 0 and again < FEWER_THAN
        if rows != "packed":
            assert (compiled, again) == (1, 1)  # the second for the other grad mode
            assert not torch._dynamo.utils.counters["graph_break"]


def loss_and_gradients(device: str, *, compiled: bool) -> dict[str, Tensor]:
    """Of a packed row under autocast to bf16, in fp32 weights."""
    torch.manual_seed(0)
    model = llada(vocab_size=64, embed_dim=32, num_layers=2, num_heads=2, mlp_dim=48, max_seq_len=64).to(device)
    if device == "cuda":
        set_packed_attention(model, "varlen")
    if compiled:
        model.compile_layers()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (1, 30), generator=generator).to(device)
    with torch.autocast(device, torch.bfloat16):
        losses = model.score(
            model(tokens, attention_mask=PackedSequences.from_lengths([12, 13, 5]).to(tokens.device)),
            torch.arange(0, 30, 2, device=device),
            labels=tokens[0, ::2],
            token_weights=torch.full((15,), 1 / 15, device=device),
            chunk_tokens=6,
        )
    losses.weighted_sum.backward()
    gradients = {name: param.grad for name, param in model.named_parameters() if param.grad is not None}
    assert len(gradients) == len([*model.parameters()])
    return {"loss": losses.weighted_sum.detach(), **gradients}


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)]
)
def test_in_bf16_compiled_is_eager_within_its_rounding(
    compilations: Callable[[], tuple[int, int]], monkeypatch: pytest.MonkeyPatch, device: str, backend: str
) -> None:
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", backend)
    compiled, eager = (loss_and_gradients(device, compiled=on) for on in (True, False))
    assert compilations()[0] > 1  # a layer, and the loss
    assert compiled["loss"].item() == pytest.approx(eager["loss"].item(), rel=1e-2)
    for name, value in eager.items():
        assert value.norm() > 0 and (compiled[name] - value).norm() <= 0.02 * value.norm(), name
