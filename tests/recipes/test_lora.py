"""The LoRA recipe in one process: what it trains and what never moves, resuming, exports, and the bases it refuses."""

import importlib
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

from dllm_jepa.config import load_config, read_config, recipe_config
from dllm_jepa.errors import CheckpointError
from dllm_jepa.export import export_checkpoint
from dllm_jepa.models import InitialWeights, load_adapter, load_hf, save_hf
from dllm_jepa.models.llada import llada
from dllm_jepa.models.tiny import tiny_tokenizer
from dllm_jepa.training import Ranks, RunDirectory, StopSignals
from tests.launching import (
    SMALL,
    SMALL_LORA,
    assert_same_state,
    copy_up_to,
    metrics,
    run_here,
    status,
    training_state,
    without_time,
)

RECIPE = "dllm_jepa_lora"
SUFFIXES = (".lora_a.weight", ".lora_b.weight", ".magnitude")
EVERY_THREE = ("checkpoint={every_n_steps: 3, keep_last: null}", "lr_scheduler.num_training_steps=6")
DROPOUT = ("model.lora_dropout=0.1",)
DORA = ("model.use_dora=true",)
QUANTIZED = ("model.embed_dim=256", "model.mlp_dim=256", "model.num_layers=1", "model.quantize_base=true")
KINDS = {"lora": (), "dropout": DROPOUT, "dora": DORA, "quantized": QUANTIZED, "qdora": (*QUANTIZED, *DORA)}
RECOMPUTED = ("enable_activation_checkpointing=true",)
NO_CLIPPING = ("clip_grad_norm=null", "lr_scheduler=null", "optimizer={_component_: torch.optim.SGD, lr: 1.0}")
BASE_MODEL: dict[str, Any] = {
    "vocab_size": 512,
    "embed_dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "mlp_dim": 48,
    "max_seq_len": 256,
    "rope_base": 10_000.0,
}


def run_lora(output_dir: Path, *overrides: str) -> list[dict[str, Any]]:
    return run_here(output_dir, *overrides, recipe=RECIPE, base=SMALL_LORA)


def build_recipe(output_dir: Path, *overrides: str) -> Any:
    """The recipe after setup, in this process."""
    cfg = recipe_config(RECIPE).check(load_config([*SMALL_LORA, f"output_dir={output_dir}", *overrides]))
    ranks = Ranks.join("cpu")
    run = RunDirectory(output_dir, "never", ranks)
    recipe = importlib.import_module(RECIPE).DLLMJEPARecipe(cfg, ranks, run, StopSignals(ranks))
    recipe.setup()
    return recipe


def base_model(seed: int) -> Any:
    model = llada(**BASE_MODEL)
    initial = InitialWeights(model, seed=seed)
    model.load_state_dict({name: initial.read(name) for name in model.state_dict()})
    return model


def is_adapter(name: str) -> bool:
    return name.endswith(SUFFIXES)


def parts(state: Mapping[str, Tensor]) -> dict[str, set[str]]:
    """The tensors of a training state by part, and in it by name."""
    names: dict[str, set[str]] = {}
    for name in state:
        part, _, rest = name.partition(".")
        if part == "trained":
            part, _, rest = rest.partition(".")
        names.setdefault(part, set()).add(rest)
    return names


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases, `one` and `other`, of the same sizes."""
    directory = tmp_path_factory.mktemp("bases")
    for name, seed in (("one", 7), ("other", 8)):
        save_hf(base_model(seed), directory / name, tokenizer=tiny_tokenizer())
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps of every kind, without interruption."""
    directory = tmp_path_factory.mktemp("whole")
    for kind, overrides in KINDS.items():
        run_lora(directory / kind, *overrides, *EVERY_THREE)
    return directory


# What is trained


def test_the_first_step_is_that_of_full_fine_tuning_seen_through_the_adapters(tmp_path: Path) -> None:
    """Adapters that change nothing: the same losses; and dL/dB is alpha / r * dL/dW A^T, with dL/dA zero.

    Both recipes take one step of plain gradient descent at rate 1, so that the move is the gradient.
    """
    once = (*NO_CLIPPING, "max_steps=1", "checkpoint.every_n_steps=1")
    expected = run_here(tmp_path / "full", *once, base=[*SMALL])
    (row,) = run_lora(tmp_path / "lora", *once)
    for key in ("loss", "diffusion_loss", "jepa_loss"):
        assert row[key] == pytest.approx(expected[0][key], rel=1e-6)
    full, lora = training_state(tmp_path / "full", 1), training_state(tmp_path / "lora", 1)
    cfg: Any = recipe_config(RECIPE).check(read_config(tmp_path / "full/config.yaml"))
    model = cfg.model.build()
    start = InitialWeights(model, seed=0)
    adapted = [name.removesuffix(".lora_a.weight") for name in lora if name.endswith(".lora_a.weight")]
    adapted = [name for name in adapted if name.startswith("trained.model.")]
    assert len(adapted) == 2 * 7
    for module in adapted:
        move = full[f"{module}.weight"] - start.read(f"{module.removeprefix('trained.model.')}.weight")
        lora_a, lora_b = lora[f"{module}.lora_a.weight"], lora[f"{module}.lora_b.weight"]
        torch.testing.assert_close(lora_b, 8.0 / 4 * move @ lora_a.T, rtol=1e-3, atol=1e-6)
        assert lora_b.norm() > 1e-4
        assert lora_a.abs().max() <= 1 / math.sqrt(lora_a.size(1))
        average = module.replace("trained.model.", "target.")
        torch.testing.assert_close(lora[f"{average}.lora_b.weight"], 0.004 * lora_b, rtol=1e-5, atol=1e-9)
        assert torch.equal(lora[f"{average}.lora_a.weight"], lora_a)


def test_the_loss_falls(tmp_path: Path) -> None:
    """Wide, as the head of random weights that reads the hidden states is frozen."""
    wide = ("model.embed_dim=128", "model.mlp_dim=64", "model.num_layers=1")
    rows = run_lora(tmp_path, *wide, "max_steps=60", "optimizer.lr=1e-2", "lr_scheduler=null")
    for key, ratio in (("diffusion_loss", 0.9), ("jepa_loss", 0.4)):
        losses = [row[key] for row in rows]
        assert sum(losses[-5:]) < ratio * sum(losses[:5]), key


@pytest.mark.parametrize("kind", ["lora", "dora", "quantized"])
def test_the_base_never_moves_and_every_adapter_does(tmp_path: Path, kind: str) -> None:
    recipe = build_recipe(tmp_path, *KINDS[kind], "monitor_every=0", "optimizer.weight_decay=0.1")
    start = {name: param.detach().clone() for name, param in recipe.model.named_parameters() if param.requires_grad}
    recipe.train()
    source = InitialWeights(recipe.model, seed=0)
    num_quantized = 0
    for name, param in recipe.model.named_parameters():
        assert is_adapter(name) == param.requires_grad
        if is_adapter(name):
            assert not torch.equal(param, start[name]), name
            continue
        expected = source.read(name)
        if isinstance(param.data, NF4Tensor):
            num_quantized += 1
            assert torch.equal(param.data.get_original_weight(), to_nf4(expected).get_original_weight()), name
            assert torch.equal(param.data.quantized_data, to_nf4(expected).quantized_data), name
        else:
            assert torch.equal(param, expected), name
        assert param.grad is None
    assert num_quantized == (7 if kind == "quantized" else 0)
    optimized = {id(param) for group in recipe.optimizer.param_groups for param in group["params"]}
    assert optimized == {id(param) for param in recipe.trained.parameters() if param.requires_grad}
    recipe.cleanup.close()


@pytest.mark.parametrize("kind", ["lora", "dora", "quantized"])
def test_the_training_state_holds_no_weight_of_the_base(whole: Path, kind: str) -> None:
    names = parts(training_state(whole / kind, 6))
    assert set(names) == {"model", "predictor", "optimizer", "target", "monitor"}
    of_layer = 7 * (3 if kind == "dora" else 2)
    assert len(names["model"]) == of_layer * (1 if kind == "quantized" else 2)
    assert all(is_adapter(name) for name in names["model"])
    assert names["target"] == names["model"]
    optimized = {name.rpartition(".")[0] for name in names["optimizer"]}
    assert optimized == {
        *(f"model.{name}" for name in names["model"]),
        *(f"predictor.{name}" for name in names["predictor"]),
    }


def test_without_the_jepa_loss_there_is_no_target_encoder(tmp_path: Path) -> None:
    rows = run_lora(tmp_path, "jepa_weight=0", *EVERY_THREE, "max_steps=3")
    assert set(parts(training_state(tmp_path, 3))) == {"model", "optimizer", "monitor"}
    assert all(row["jepa_loss"] == 0 and row["loss"] == row["diffusion_loss"] for row in rows)


# The same run, however it is cut


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_resumed_run_is_bit_identical(tmp_path: Path, whole: Path, kind: str) -> None:
    """From what the run would have left if it had died at step 3."""
    copy_up_to(whole / kind, tmp_path / "run", step=3)
    run_lora(tmp_path / "run", *KINDS[kind], *EVERY_THREE, "resume=auto")
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert without_time(metrics(tmp_path / "run")) == without_time(metrics(whole / kind))
    assert_same_state(tmp_path / "run", whole / kind, 6)


def test_the_kinds_are_different_runs(whole: Path) -> None:
    """So that the comparisons of resumed runs are of what they say: dropout drops, and so on."""
    last = {kind: metrics(whole / kind)[-1]["loss"] for kind in KINDS}
    assert len(set(last.values())) == len(KINDS)
    first = {kind: metrics(whole / kind)[0]["loss"] for kind in KINDS}
    assert first["lora"] == pytest.approx(first["dora"], rel=1e-6)
    assert first["quantized"] == pytest.approx(first["qdora"], rel=1e-6)


@pytest.mark.parametrize(
    ("kind", "split"),
    [
        ("lora", ("tokens_per_device=130",)),
        ("lora", ("packed=false", "tokens_per_device=300")),
        ("lora", RECOMPUTED),
        ("dora", ("tokens_per_device=130",)),
        ("dora", RECOMPUTED),
        ("quantized", ("packed=false", "tokens_per_device=300")),
    ],
)
def test_any_split_of_the_batch_is_the_same_run(tmp_path: Path, whole: Path, kind: str, split: tuple[str, ...]) -> None:
    rows = run_lora(tmp_path, *KINDS[kind], *EVERY_THREE, *split)
    for row, expected in zip(rows, metrics(whole / kind), strict=True):
        for key in ("loss", "diffusion_loss", "jepa_loss", "grad_norm"):
            assert row[key] == pytest.approx(expected[key], rel=1e-5), key
        assert (row["micro_batches"] > expected["micro_batches"]) == (split != RECOMPUTED)
    state, reference = training_state(tmp_path, 6), training_state(whole / kind, 6)
    assert state.keys() == reference.keys()
    for name in (name for name in reference if name.startswith(("trained", "target"))):
        assert (state[name] - reference[name]).norm() <= 1e-4 * reference[name].norm(), name


def test_a_finished_run_is_left_alone(tmp_path: Path, bases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = (f"checkpoint_dir={bases / 'one'}", *EVERY_THREE, "max_steps=3", "export=both")
    run_lora(tmp_path / "run", *settings)

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}

    before = files()
    assert {"adapter", "adapter_target"} <= {path.name for path in before}
    assert not {"hf", "hf_target"} & {path.name for path in before}
    run_lora(tmp_path / "run", *settings, "resume=auto")
    assert "holds a finished run of 3 steps: nothing to do" in capsys.readouterr().out
    assert files() == before
    run_lora(tmp_path / "run", *settings, "resume=auto", "export_merged=true")  # what is asked for later is owed
    assert files().items() > {path: time for path, time in before.items() if path.parent.name == "adapter"}.items()
    assert (tmp_path / "run/hf/config.json").exists() and (tmp_path / "run/hf_target/config.json").exists()
    assert status(tmp_path / "run")["state"] == "finished"


# Exports


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapter_and_merged_model_compute_the_same(tmp_path: Path, bases: Path, kind: str) -> None:
    run_lora(
        tmp_path,
        *KINDS[kind],
        f"checkpoint_dir={bases / 'one'}",
        *EVERY_THREE,
        "optimizer.lr=1e-2",
        "target_encoder.ema_decay=0.5",
        "export=both",
        "export_merged=true",
    )
    tokens = torch.randint(0, 500, (3, 20), generator=torch.Generator().manual_seed(0))
    logits = {}
    with torch.no_grad():
        base = load_hf(bases / "one").token_logits(tokens)
        for adapter, merged in (("adapter", "hf"), ("adapter_target", "hf_target")):
            logits[adapter] = load_adapter(tmp_path / adapter).token_logits(tokens)
            torch.testing.assert_close(
                logits[adapter], load_hf(tmp_path / merged).token_logits(tokens), rtol=1e-6, atol=1e-6
            )
            assert (logits[adapter] - base).abs().max() > 1e-3
    assert (logits["adapter"] - logits["adapter_target"]).abs().max() > 1e-3

    # They are those of the last training state, and the model that was trained had the same logits.
    state = training_state(tmp_path, 6)
    for adapter, prefix in (("adapter", "trained.model."), ("adapter_target", "target.")):
        loaded = {
            name: param for name, param in load_adapter(tmp_path / adapter).named_parameters() if is_adapter(name)
        }
        assert loaded.keys() == {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
        assert all(torch.equal(param, state[f"{prefix}{name}"]) for name, param in loaded.items())
    plain = load_hf(tmp_path / "hf").state_dict()
    frozen = load_hf(bases / "one").state_dict()
    adapted = {f"{name.removesuffix('.lora_a.weight')}.weight" for name in loaded if name.endswith(".lora_a.weight")}
    assert {name for name in plain if not torch.equal(plain[name], frozen[name])} == adapted
    for directory in ("adapter", "adapter_target", "hf", "hf_target"):
        assert (tmp_path / directory / "README.md").exists()
        assert (tmp_path / directory / "tokenizer.json").exists() == directory.startswith("hf")  # the base has its own


# Its base


def refusal(capsys: pytest.CaptureFixture[str], output_dir: Path, *overrides: str) -> str:
    """The message of a run that is refused and changes nothing."""

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file() and path.name != ".lock"}

    before = contents()
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        run_lora(output_dir, *overrides)
    assert exit_info.value.code == 1
    assert contents() == before
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    return message


def test_adapters_go_on_upon_their_base_alone(tmp_path: Path, bases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_lora(tmp_path / "whole", f"checkpoint_dir={bases / 'one'}", *EVERY_THREE)
    run_lora(tmp_path / "run", f"checkpoint_dir={bases / 'one'}", *EVERY_THREE, "max_steps=3")
    for override in ((), ("resume_override=true",)):
        other = f"checkpoint_dir={bases / 'other'}"
        message = refusal(capsys, tmp_path / "run", other, *EVERY_THREE, "resume=auto", *override)
        assert f"trained on other weights than those of {bases / 'other'}" in message
        assert f"the checkpoint_dir of its base, which was {bases / 'one'}" in message
    message = refusal(capsys, tmp_path / "run", *EVERY_THREE, "resume=auto")  # random weights
    assert "other weights" in message and str(bases / "one") in message
    shutil.copytree(bases / "one", tmp_path / "moved")
    run_lora(tmp_path / "run", f"checkpoint_dir={tmp_path / 'moved'}", *EVERY_THREE, "resume=auto")
    assert without_time(metrics(tmp_path / "run")) == without_time(metrics(tmp_path / "whole"))
    assert_same_state(tmp_path / "run", tmp_path / "whole", 6)


def test_another_seed_makes_another_random_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a checkpoint the base comes from the seed, which may not change."""
    run_lora(tmp_path, *EVERY_THREE, "max_steps=3")
    assert "seed: 0 -> 5" in refusal(capsys, tmp_path, *EVERY_THREE, "resume=auto", "seed=5")


@pytest.mark.parametrize("merged", [False, True])
def test_a_checkpoint_is_exported_on_a_base_that_has_moved(tmp_path: Path, merged: bool) -> None:
    """The tokenizer of the config is not asked for: its directory may be that of the base."""
    save_hf(base_model(0), tmp_path / "base", tokenizer=tiny_tokenizer())
    here = (f"checkpoint_dir={tmp_path / 'base'}", f"tokenizer.path={tmp_path / 'base'}")
    run_lora(
        tmp_path / "run", *here, "max_steps=1", "checkpoint.every_n_steps=1", "export=online", "export_merged=true"
    )
    (tmp_path / "base").rename(tmp_path / "moved")
    saved = tmp_path / "run/checkpoints/latest"
    with pytest.raises(CheckpointError, match="which is not a directory here"):
        export_checkpoint(saved, tmp_path / "out", merged=merged)
    export_checkpoint(saved, tmp_path / "out", merged=merged, base=tmp_path / "moved")
    name = "model-00001-of-00001.safetensors" if merged else "adapter_model.safetensors"
    exported = load_file(tmp_path / "out" / name)
    expected = load_file(tmp_path / "run" / ("hf" if merged else "adapter") / name)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in exported.items())
    save_hf(base_model(1), tmp_path / "other", tokenizer=tiny_tokenizer())
    with pytest.raises(CheckpointError, match="were trained on other weights than those of .*other"):
        export_checkpoint(saved, tmp_path / "wrong", merged=merged, base=tmp_path / "other")
    assert not (tmp_path / "wrong").exists()
