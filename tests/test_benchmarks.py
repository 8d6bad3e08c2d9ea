"""The benchmark of whole steps measures what it says, and its reference is the same objective as ours."""

import json

import pytest
import torch

from benchmarks import step_cost
from benchmarks.step_cost import ARMS, Setting, Trainer

TINY = Setting(
    embed_dim=16,
    num_layers=2,
    num_heads=2,
    mlp_dim=32,
    vocab_size=64,
    num_sequences=4,
    num_tokens=24,
    shortest=8,
    mask_ratio=0.3,
    threads=torch.get_num_threads(),
)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("jepa", [False, True])
def test_the_reference_has_our_losses_and_gradients(jepa: bool, packed: bool) -> None:
    """Every position scored in padded rows, against masked positions only."""
    ours, reference = (Trainer(TINY, jepa=jepa, checkpointing=checkpointing) for checkpointing in (True, False))
    losses = ours.losses(next(ours.batches[packed].step(0)), jepa)
    expected = reference.full_logits_losses(next(reference.batches[False].step(0)), jepa)
    assert {name: losses[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert expected["diffusion_loss"] > 1 and (expected["jepa_loss"] > 0.1) == jepa
    gradients = [[param.grad for param in trainer.trained.parameters()] for trainer in (ours, reference)]
    assert all(gradient is not None and gradient.any() for gradient in gradients[1])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ARMS)
def test_a_step_is_whole(name: str) -> None:
    """It moves every weight, the average after them, and leaves no gradient."""
    trainer = Trainer(TINY, jepa=True, checkpointing=False)
    weights = [param.clone() for param in trainer.trained.parameters()]
    averages = [param.clone() for param in trainer.target_encoder.backbone.parameters()]
    trainer.step(ARMS[name], 0)
    named = zip(trainer.trained.named_parameters(), weights, strict=True)
    moved = {part: not torch.equal(old, new) for (part, new), old in named}
    assert moved == {part: ARMS[name].jepa or not part.startswith("predictor") for part in moved}
    online = trainer.model.backbone.parameters() if ARMS[name].jepa else averages
    expected = [torch.lerp(old, new, 0.004) for old, new in zip(averages, online, strict=True)]
    torch.testing.assert_close([*trainer.target_encoder.backbone.parameters()], expected, rtol=1e-6, atol=1e-8)
    assert all(param.grad is None for param in trainer.trained.parameters())


def test_arms_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, step_cost.Arm]] = []
    monkeypatch.setattr(Trainer, "step", lambda self, arm, number: taken.append((number, arm)))
    seconds = step_cost.time_steps(TINY, ["jepa", "diffusion"], checkpointing=True, steps=2)
    assert {name: len(values) for name, values in seconds.items()} == {"jepa": 2, "diffusion": 2}
    there, back = [ARMS["jepa"], ARMS["diffusion"]], [ARMS["diffusion"], ARMS["jepa"]]
    assert taken == [(number, arm) for number in range(5) for arm in (there if number % 2 else back)]


@pytest.mark.slow
def test_a_run_prints_measurements_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    """With a large vocabulary, so that the logits of every token stand out in the memory of a process."""
    sizes = "--embed-dim 16 --num-layers 1 --num-heads 2 --mlp-dim 32 --vocab-size 16000 --num-tokens 64"
    run = "--steps 2 --arms full_diffusion diffusion --checkpointing off"
    step_cost.main([*sizes.split(), *run.split(), "--threads", str(torch.get_num_threads())])
    lines = capsys.readouterr().out.splitlines()
    full, ours = (json.loads(line) for line in lines if "step_s" in line)
    assert full.keys() == ours.keys() == {"arm", "activation_checkpointing", "step_s", "peak_mib"}
    logits_mib = 8 * 64 * 16000 * 4 / 2**20
    assert full["peak_mib"] > 2 * logits_mib  # they and their gradient
    assert full["peak_mib"] - ours["peak_mib"] > logits_mib
    time, memory = (ours[key] / full[key] for key in ("step_s", "peak_mib"))
    assert lines[-1] == f"| diffusion / full_diffusion | off | {time:.3f} |  | {memory:.3f} |  |"


def test_a_profile_names_operators() -> None:
    assert "aten::mm" in step_cost.profile(TINY, "jepa", checkpointing=False, steps=1)
