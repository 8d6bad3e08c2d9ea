"""The benchmark of whole steps measures what it says, and its references are the same objective as ours."""

import functools
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torchao.float8.float8_linear import Float8Linear

from dllm_jepa.jepa import transformer_predictor
from dllm_jepa.models import Backbone, load_hf, step_flops, use_float8
from dllm_jepa.models.llada import llada

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # scripts import their siblings
flops: Any = importlib.import_module("flops")
machine: Any = importlib.import_module("_machine")
startup: Any = importlib.import_module("startup")
step_cost: Any = importlib.import_module("step_cost")
steps: Any = importlib.import_module("_steps")

ARMS = steps.ARMS
SIZES = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "mlp_dim": 32, "vocab_size": 64, "num_tokens": 24}
TINY = steps.Setting(
    **SIZES, num_sequences=4, shortest=8, mask_ratio=0.3, logits_chunk_tokens=7, threads=torch.get_num_threads()
)
EAGER = [name for name, arm in ARMS.items() if not arm.compiled and not arm.float8]


def losses_and_gradients(
    arms: list[str], *, checkpointing: bool = False
) -> dict[str, tuple[dict[str, float], list[Tensor]]]:
    """Of each arm on its own, from the same random weights; gradients of the model."""
    found = {}
    for name in arms:
        trainer = steps.Trainer(TINY, [ARMS[name]], checkpointing=checkpointing)
        (batch,) = trainer.batches[ARMS[name].packed].step(0)
        losses = {key: loss.item() for key, loss in trainer.losses(batch, ARMS[name]).items()}
        found[name] = losses, [param.grad for param in trainer.model.parameters()]
    return found


def test_arms_of_one_objective_agree() -> None:
    """Every position scored in padded rows, masked ones scored there, and ours: the same losses and gradients."""
    found = losses_and_gradients(["full_diffusion", "full_head_diffusion", "diffusion_padded"])
    (loss, gradients), *others = found.values()
    ours, ours_checkpointed = (
        losses_and_gradients(["diffusion"], checkpointing=on)["diffusion"] for on in (True, False)
    )
    assert loss["diffusion_loss"] > 1 and all(gradient.any() for gradient in gradients)
    for other_loss, other_gradients in (*others, ours, ours_checkpointed):
        assert other_loss["diffusion_loss"] == pytest.approx(loss["diffusion_loss"], rel=1e-5)
        torch.testing.assert_close(other_gradients, gradients, rtol=1e-4, atol=1e-6)


def test_jepa_adds_its_loss_and_its_gradient() -> None:
    (jepa, jepa_gradients), (padded, padded_gradients), (plain, gradients) = losses_and_gradients(
        ["jepa", "jepa_padded", "diffusion"]
    ).values()
    assert jepa["diffusion_loss"] == plain["diffusion_loss"] and jepa["jepa_loss"] > 0.1 and plain["jepa_loss"] == 0
    assert jepa == pytest.approx(padded, rel=1e-5, nan_ok=True)
    torch.testing.assert_close(jepa_gradients, padded_gradients, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(jepa_gradients[0], gradients[0], rtol=1e-3)


def test_a_reference_has_logits_of_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a loss at every one of them, or at the masked ones only."""
    rows: list[int] = []
    cross_entropy = torch.nn.functional.cross_entropy

    def recorded(logits: Tensor, *rest: Any, **options: Any) -> Tensor:
        assert logits.dtype == torch.float32
        rows.append(len(logits))
        return cross_entropy(logits, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", recorded)
    references = [ARMS[name] for name in ("full_diffusion", "full_head_diffusion")]
    trainer = steps.Trainer(TINY, references, checkpointing=False)
    (batch,) = trainer.batches[False].step(0)
    scored: list[int] = []
    trainer.models[False].head.register_forward_hook(lambda *call: scored.append(call[2].shape[:-1].numel()))
    for arm in references:
        trainer.losses(batch, arm)
    assert scored == 2 * [batch.context.numel()]
    assert rows == [batch.context.numel(), len(batch.labels)]


@pytest.mark.parametrize("name", EAGER)
def test_a_step_is_whole(name: str) -> None:
    """It moves every weight, the average after them, and leaves no gradient."""
    trainer = steps.Trainer(TINY, [ARMS[name], ARMS["jepa"]], checkpointing=True)
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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_arms_share_their_weights(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager, compiled and float8 modules are distinct, what they train is not; only some of them are converted."""
    compiled: list[nn.Module] = []
    monkeypatch.setattr(Backbone, "compile_layers", lambda module: compiled.append(module))
    trainer = steps.Trainer(TINY, ARMS.values(), checkpointing=checkpointing)
    for model in trainer.models.values():
        assert all(ours is theirs for ours, theirs in zip(model.parameters(), trainer.model.parameters(), strict=True))
        layers = {isinstance(layer, CheckpointWrapper) for layer in model.backbone.layers}
        assert layers == {checkpointing}
    for (_, is_float8), embedder in trainer.embedders.items():
        averages = zip(embedder.backbone.parameters(), trainer.target_encoder.backbone.parameters(), strict=True)
        assert all(ours is theirs for ours, theirs in averages)
        assert isinstance(embedder.backbone.layers[0].mlp.w1, Float8Linear) == is_float8
    embedders = [trainer.embedders[True, is_float8].backbone for is_float8 in (False, True)]
    assert trainer.models[True] is not trainer.models[False]
    parts = {id(part) for part in (trainer.models[True].backbone, *embedders)}
    assert len(compiled) == 3 and {id(module) for module in compiled} == parts


@pytest.mark.slow
def test_compiled_and_float8_steps_are_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the target of the float8 one differs, by the rounding."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    monkeypatch.setattr(steps, "use_float8", functools.partial(use_float8, emulate=True))
    names = ("jepa", "jepa_compiled", "jepa_float8")
    trainer = steps.Trainer(TINY, [ARMS[name] for name in names], checkpointing=True)
    (batch,) = trainer.batches[True].step(0)
    eager, compiled, float8 = (
        {key: loss.item() for key, loss in trainer.losses(batch, ARMS[name]).items()} for name in names
    )
    assert compiled == pytest.approx(eager, rel=1e-5, nan_ok=True)
    assert float8["diffusion_loss"] == eager["diffusion_loss"]
    assert 0 < abs(float8["jepa_loss"] - eager["jepa_loss"]) < 0.05


def test_arms_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, Any]] = []
    monkeypatch.setattr(steps.Trainer, "step", lambda self, arm, number: taken.append((number, arm)))
    seconds = step_cost.time_steps(TINY, ["jepa", "diffusion"], checkpointing=True, steps=2)
    assert {name: len(values) for name, values in seconds.items()} == {"jepa": 2, "diffusion": 2}
    there, back = [ARMS["jepa"], ARMS["diffusion"]], [ARMS["diffusion"], ARMS["jepa"]]
    assert taken == [(number, arm) for number in range(5) for arm in (there if number % 2 else back)]


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--arms", "jepa_float8"], ["--profile", "jepa_float8_compiled"]):
        with pytest.raises(SystemExit):
            step_cost.read_arguments(words)
        assert f"{words[1]} needs --device cuda" in capsys.readouterr().err
    assert not [name for name in step_cost.read_arguments([])[1].arms if ARMS[name].float8]
    assert step_cost.read_arguments(["--device", "cuda"])[1].arms == [*ARMS]
    assert step_cost.read_arguments([])[0].logits_chunk_tokens == 1024
    assert step_cost.read_arguments(["--logits-chunk-tokens", "5"])[0].logits_chunk_tokens == 5


def test_ratios_stand_beside_their_limits() -> None:
    rows = {
        "jepa": {"step_s": 3.0, "peak_mib": 10.0},
        "full_diffusion": {"step_s": 6.0, "peak_mib": 40.0},
        "jepa_compiled": {"step_s": 1.5},
    }
    assert step_cost.ratio_lines(rows, checkpointing=False) == [
        "| jepa / full_diffusion | off | 0.500 | 0.58 | 0.250 | 0.62 |",
        "| jepa_compiled / jepa | off | 0.500 |  |  |  |",
    ]
    assert step_cost.ratio_lines(rows, checkpointing=True)[0].endswith("| 0.500 | 0.75 | 0.250 | 0.45 |")
    assert {name for above, below, *_ in step_cost.RATIOS for name in (above, below)} == ARMS.keys()


@pytest.mark.slow
def test_a_run_prints_measurements_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    """With a large vocabulary, so that the logits of every token stand out in the memory of a process."""
    sizes = "--embed-dim 16 --num-layers 1 --num-heads 2 --mlp-dim 32 --vocab-size 16000 --num-tokens 64"
    run = "--steps 2 --arms full_diffusion diffusion --checkpointing off --mmap-threshold 262144"
    step_cost.main([*sizes.split(), *run.split(), "--threads", str(torch.get_num_threads())])
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[1])["mmap_threshold"] == 262144
    full, ours = (json.loads(line) for line in lines if "step_s" in line)
    assert full.keys() == ours.keys() == {"arm", "activation_checkpointing", "step_s", "peak_mib"}
    logits_mib = 8 * 64 * 16000 * 4 / 2**20
    assert full["peak_mib"] > 2 * logits_mib  # they and their gradient
    assert full["peak_mib"] - ours["peak_mib"] > logits_mib
    time, memory = (ours[key] / full[key] for key in ("step_s", "peak_mib"))
    assert lines[-1] == f"| diffusion / full_diffusion | off | {time:.3f} |  | {memory:.3f} |  |"


def test_a_profile_names_operators() -> None:
    assert "aten::mm" in step_cost.profile(TINY, "jepa", checkpointing=False, steps=1)


def test_a_call_alone_gets_its_environment(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import json, os, sys\nprint('noise')\nprint(json.dumps([sys.argv[1:], os.environ['ADDED']]))\n")
    assert machine.call_alone(str(script), {"a": 1}, {"ADDED": "x"}) == [["--alone", '{"a": 1}'], "x"]


def test_peaks_start_anew() -> None:
    large = torch.ones(64 * 2**20)
    assert machine.resident("VmHWM") > large.nbytes
    del large
    before = machine.forget_peak()
    assert machine.resident("VmHWM") - before < 32 * 2**20
    small = torch.ones(16 * 2**20)
    assert machine.resident("VmHWM") - before > small.nbytes / 2


def test_start_up_is_timed_phase_by_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the weights of the checkpoint, whose sizes stand above those that were asked for."""
    checkpoint = tmp_path / "checkpoint"
    startup.write_checkpoint(TINY, checkpoint)
    setting, arguments = startup.read_arguments(["--checkpoint", str(checkpoint), "--num-tokens", "24"])
    assert {name: getattr(setting, name) for name in SIZES} == SIZES
    startup.forget_files(arguments.checkpoint)
    trainers: list[Any] = []
    init = steps.Trainer.__init__

    def recorded(self: Any, *parts: Any, **options: Any) -> None:
        init(self, *parts, **options)
        weights = {name: param.clone() for name, param in self.model.named_parameters()}
        averages = {name: param.clone() for name, param in self.target_encoder.backbone.named_parameters()}
        trainers.append((weights, averages))

    monkeypatch.setattr(steps.Trainer, "__init__", recorded)
    seconds = startup.start_up(TINY, "jepa", checkpoint=str(checkpoint), started=startup.time.time() - 5)
    assert tuple(seconds) == startup.PHASES and min(seconds.values()) > 0 and 5 < seconds["imports"] < 6
    ((weights, averages),) = trainers
    expected = dict(load_hf(checkpoint).named_parameters())
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    assert all(torch.equal(average, expected[f"backbone.{name}"]) for name, average in averages.items())


def test_the_table_of_start_up_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    startup.print_table({"eager, cold": dict(zip(startup.PHASES, (1, 2, 4, 8, 16, 32), strict=True))}, 10**9)
    expected = "| eager, cold | 1.00 | 2.00 | 4.00 | 8.00 | 16.00 | 32.00 | 31.00 | 0.25 |"
    assert capsys.readouterr().out.splitlines()[-1] == expected


def test_flops_of_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, they are those of the formula and the means of pooling; LLM-JEPA has a second backward of a body."""
    sizes = {"vocab_size": 500, "embed_dim": 32, "num_layers": 2, "num_heads": 2, "mlp_dim": 48}
    monkeypatch.setitem(flops.MODELS, "small", lambda: llada(**sizes))
    with torch.device("meta"):
        model = llada(**sizes)
        trained = nn.ModuleDict({"model": model, "predictor": transformer_predictor(32, 48)})
    shape = {"sequences": 3, "tokens": 20}
    counts = {"sequences": 3, "tokens": 60, "squared_lengths": 3 * 20**2}
    found = {
        name: flops.count_flops("small", method, **shape, mask_ratio=0.25, checkpointing="none")
        for name, method in flops.METHODS.items()
    }
    pooling = 2 * 3 * 60 * 32  # one product of [S, N] and [N, D]
    assert found["diffusion"] == step_flops(trained, **counts, scored=15, target=False)
    assert found["full_diffusion"] == step_flops(trained, **counts, scored=60, target=False)
    assert found["dllm_jepa"] == step_flops(trained, **counts, scored=15, target=True) + 3 * pooling
    forward = step_flops(trained, **counts, scored=0, target=False) / 3
    assert found["llm_jepa"] == found["dllm_jepa"] + 2 * forward + pooling
    checkpointed = {
        kind: flops.count_flops("small", flops.METHODS["dllm_jepa"], **shape, mask_ratio=0.25, checkpointing=kind)
        for kind in flops.CHECKPOINTING
    }
    assert checkpointed["none"] < checkpointed["early stop"] < checkpointed["full"]
    assert checkpointed["full"] == checkpointed["none"] + forward
