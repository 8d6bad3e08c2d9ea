"""Stopping and going on, in one process: whatever happens in between, it is the run that would have been."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dllm_jepa import cli
from dllm_jepa.models import load_hf
from tests.launching import assert_same_state, metrics, run_here, status, training_state, without_time
from tests.training.small_checkpoints import flip_a_byte, forge

EVERY_TWO = ("checkpoint={every_n_steps: 2, keep_last: null}",)


def signal_at(step: int, name: str) -> str:
    return f"metric_logger={{_component_: tests.launching.SignalAtStep, at_step: {step}, name: {name}}}"


def exits_with(code: int, output_dir: Path, *overrides: str) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run_here(output_dir, *overrides)
    assert exit_info.value.code == code


def saved_steps(output_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step_")) for path in (output_dir / "checkpoints").glob("step_*"))


def refusal(capsys: pytest.CaptureFixture[str], output_dir: Path, *overrides: str) -> str:
    """The message of a run that is refused and changes nothing."""
    before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file() and path.name != ".lock"}
    capsys.readouterr()
    exits_with(1, output_dir, *overrides)
    assert {
        path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file() and path.name != ".lock"
    } == before
    message = capsys.readouterr().err
    assert message.count("error:") == 1
    return message


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps without interruption."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    run_here(directory, *EVERY_TWO)
    return directory


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_finishes_the_step_and_saves(tmp_path: Path, whole: Path, name: str) -> None:
    run = tmp_path / "run"
    exits_with(75, run, signal_at(3, name))  # without a single checkpoint asked for
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_00000003"]
    assert (status(run)["state"], status(run)["reason"], status(run)["step"]) == ("stopped", name, 3)
    assert status(run)["checkpoint"] == str(run / "checkpoints/step_00000003")
    run_here(run, "resume=auto", *EVERY_TWO)
    assert without_time(metrics(run)) == without_time(metrics(whole))
    assert_same_state(run, whole, 6)
    assert status(run)["state"] == "finished"


def test_asynchronous_saves_are_the_same_states(tmp_path: Path, whole: Path) -> None:
    exits_with(75, tmp_path, *EVERY_TWO, "checkpoint.async_save=true", signal_at(3, "SIGTERM"))
    run_here(tmp_path, *EVERY_TWO, "checkpoint.async_save=true", "resume=auto")
    assert without_time(metrics(tmp_path)) == without_time(metrics(whole))
    for step in (2, 4, 6):
        assert_same_state(tmp_path, whole, step)


def test_a_signal_on_a_step_that_is_saved_anyway(tmp_path: Path) -> None:
    exits_with(75, tmp_path, *EVERY_TWO, signal_at(4, "SIGTERM"))
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step*"))] == [
        "step_00000002",
        "step_00000004",
    ]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    (run / "status.json").unlink()
    for step in (4, 6):
        flip_a_byte(run / f"checkpoints/step_{step:08d}/__0_0.distcp", -1000)
    run_here(run, *EVERY_TWO, "resume=auto")
    message = capsys.readouterr().err
    assert "step_00000004 is damaged: __0_0.distcp does not match its checksum" in message
    assert f"going on from {run}/checkpoints/step_00000002, step 2" in message
    assert without_time(metrics(run)) == without_time(metrics(whole))
    assert_same_state(run, whole, 6)
    assert (run / "checkpoints/step_00000004.damaged/__0_0.distcp").exists()


def test_harmless_changes_are_said_and_change_nothing(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exits_with(75, tmp_path, *EVERY_TWO, signal_at(2, "SIGTERM"))
    capsys.readouterr()
    run_here(tmp_path, *EVERY_TWO, "resume=auto", "monitor_every=0", "log_every_n_steps=5")
    message = capsys.readouterr().err
    assert "changed: monitor_every: 2 -> 0" in message
    assert "changed: log_every_n_steps: 1 -> 5" in message
    assert [row["loss"] for row in metrics(tmp_path)] == [row["loss"] for row in metrics(whole)]


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.mlp_dim=64", "model.mlp_dim: 48 -> 64"),
        ("model.num_layers=1", "model.num_layers: 2 -> 1"),
        ("model._component_=dllm_jepa.models.dream.dream", "model._component_:"),
        ("jepa_weight=0", "jepa_weight: 1.0 -> 0"),
        ("lr_scheduler=null", "lr_scheduler:"),
        ("seed=5", "seed: 0 -> 5"),
    ],
)
def test_what_makes_another_run_is_refused(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str], override: str, line: str
) -> None:
    resume = f"resume={whole}/checkpoints/step_00000002"
    assert f"  - {line}" in refusal(capsys, tmp_path / "new", resume, override)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("overrides", "lines"),
    [
        (("model.mlp_dim=64",), ["layers.0.mlp.w1.weight: saved (48, 32), needed (64, 32)"]),
        (("model.num_layers=1",), ["layers.1.attn.q_proj.weight: saved (32, 32), needed nothing"]),
        (("model.num_layers=3",), ["layers.2.attn.q_proj.weight: saved nothing, needed (32, 32)"]),
        (
            ("model._component_=dllm_jepa.models.dream.dream", "model.num_kv_heads=2"),
            [
                "layers.0.attn.k_proj.weight: saved (32, 32), needed (16, 32)",
                "q_proj.bias: saved nothing, needed (32,)",
            ],
        ),
    ],
)
def test_even_when_it_is_meant_the_tensors_must_fit(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], lines: list[str]
) -> None:
    resume = (f"resume={whole}/checkpoints/step_00000002", "resume_override=true")
    message = refusal(capsys, tmp_path / "new", *resume, *overrides)
    assert all(f"trained.model.backbone.{line}" in message or line in message for line in lines)
    assert not (tmp_path / "new").exists()


def test_a_change_that_is_meant_takes_effect(tmp_path: Path, whole: Path) -> None:
    """Another rate from step 3 on, on its own schedule; moments and weights are those of the checkpoint."""
    resume = (f"resume={whole}/checkpoints/step_00000002", "resume_override=true")
    rows = run_here(tmp_path / "run", *resume, "optimizer.lr=5e-4")
    before = metrics(whole)
    assert [row["step"] for row in rows] == [3, 4, 5, 6]
    assert rows[0]["loss"] == before[2]["loss"]
    assert [row["lr"] for row in rows] == pytest.approx([row["lr"] / 2 for row in before[2:]])
    assert rows[1]["loss"] != before[3]["loss"]


def test_other_data_under_the_same_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"description": f"lines with {n} digits", "regex": f".*[0-9]{{{n}}}.*"} for n in range(24)]
    source = tmp_path / "train.jsonl"

    def write(changed: list[dict[str, str]]) -> None:
        source.write_text("".join(json.dumps(row) + "\n" for row in changed))

    write(rows)
    data = (f"dataset={{_component_: dllm_jepa.data.nlrx, source: {source}, template: chat}}", "max_steps=3")
    exits_with(75, tmp_path / "run", *data, signal_at(2, "SIGTERM"))
    write([*rows[:5], rows[6], rows[5], *rows[7:]])  # two rows have changed places
    message = refusal(capsys, tmp_path / "run", *data, "resume=auto")
    assert "trained on other data: 24 sequences then, 24 sequences now, and their tokens differ" in message
    moved = source.rename(tmp_path / "moved.jsonl")
    source = moved
    write(rows)
    elsewhere = data[0].replace("train.jsonl", "moved.jsonl")
    run_here(tmp_path / "run", elsewhere, *data[1:], "resume=auto")
    assert "changed: dataset.source:" in capsys.readouterr().err


def test_the_last_state_is_saved_too(tmp_path: Path) -> None:
    run_here(tmp_path, "checkpoint.every_n_steps=4")
    assert [path.name for path in sorted((tmp_path / "checkpoints").glob("step*"))] == [
        "step_00000004",
        "step_00000006",
    ]


def test_more_steps_on_the_same_schedule(tmp_path: Path, whole: Path) -> None:
    """The schedule is fixed, so a run of three steps is the beginning of one of six."""
    fixed = (*EVERY_TWO, "lr_scheduler.num_training_steps=6")
    run_here(tmp_path, *fixed, "max_steps=3")
    run_here(tmp_path, *fixed, "resume=auto", "max_steps=6")
    assert without_time(metrics(tmp_path)) == without_time(metrics(whole))
    assert_same_state(tmp_path, whole, 6)


def test_checkpoints_looked_for_in_the_wrong_place_are_not_forgotten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exits_with(75, tmp_path / "run", signal_at(2, "SIGTERM"))
    message = refusal(capsys, tmp_path / "run", "resume=auto", f"checkpoint.directory={tmp_path}/elsewhere")
    assert "has a training state in" in message and "step_00000002, and checkpoint.directory leads to" in message
    assert not (tmp_path / "elsewhere").exists()


def test_a_finished_run_still_owes_an_export_that_is_asked_for_later(tmp_path: Path) -> None:
    run_here(tmp_path, "checkpoint.every_n_steps=3", "max_steps=3", "export=online")
    run_here(tmp_path, "checkpoint.every_n_steps=3", "max_steps=3", "export=both", "resume=auto")
    assert (tmp_path / "hf_target/config.json").exists()


def test_a_start_after_a_failed_one_of_the_same_launch(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun does with --max-restarts: whatever `resume` says, it goes on; but not after a signal."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch 1")
    with pytest.raises(ZeroDivisionError):
        run_here(tmp_path / "run", *EVERY_TWO, "metric_logger={_component_: tests.launching.FailAtStep, at_step: 3}")
    assert status(tmp_path / "run")["state"] == "failed"
    exits_with(1, tmp_path / "run", *EVERY_TWO)  # not started by torchrun: it holds a run
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    exits_with(75, tmp_path / "run", *EVERY_TWO, signal_at(5, "SIGTERM"))
    assert [row["step"] for row in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]
    exits_with(75, tmp_path / "run", *EVERY_TWO)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "launch 2")
    exits_with(1, tmp_path / "run", *EVERY_TWO)
    run_here(tmp_path / "run", *EVERY_TWO, "resume=auto")
    assert_same_state(tmp_path / "run", whole, 6)


# Exports


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exported") / "run"
    run_here(directory, "checkpoint.every_n_steps=3", "max_steps=3", "export=both")
    return directory


def test_both_models_are_exported(exported: Path) -> None:
    state = training_state(exported, 3)
    online, target = (load_hf(exported / name).state_dict() for name in ("hf", "hf_target"))
    assert online.keys() == target.keys()
    for name, weight in online.items():
        assert torch.equal(weight, state[f"trained.model.{name}"])
        of_target = f"target.{name.removeprefix('backbone.')}"
        assert torch.equal(target[name], state.get(of_target, weight)), name
        assert (of_target in state) == name.startswith("backbone.")
    assert not torch.equal(online["backbone.norm.scale"], target["backbone.norm.scale"])


@pytest.mark.parametrize(("part", "folder"), [("online", "hf"), ("target", "hf_target")])
def test_the_command_exports_the_same_files(exported: Path, tmp_path: Path, part: str, folder: str) -> None:
    words = ["export", str(exported / "checkpoints/latest"), "--part", part]
    out, bf16 = tmp_path / "out", tmp_path / "bf16"
    cli.main([*words, str(out)])
    ours, theirs = ({path.name: path.read_bytes() for path in d.iterdir()} for d in (out, exported / folder))
    assert ours == theirs
    cli.main([*words, str(bf16), "--dtype", "bf16"])
    whole, half = (load_file(directory / "model-00001-of-00001.safetensors") for directory in (out, bf16))
    assert all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)


def test_an_export_that_was_interrupted_is_completed(exported: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(exported, tmp_path / "run", symlinks=True))
    shutil.rmtree(run / "hf_target")
    (run / "hf_target.unfinished").mkdir()
    (run / "status.json").write_text('{"state": "running", "step": 3}')
    before = (run / "hf/config.json").stat().st_mtime_ns
    run_here(run, "checkpoint.every_n_steps=3", "max_steps=3", "export=both", "resume=auto")
    assert (run / "hf/config.json").stat().st_mtime_ns == before
    for file in (exported / "hf_target").glob("model*"):
        assert (run / "hf_target" / file.name).read_bytes() == file.read_bytes()


def test_the_model_card_says_what_it_is(exported: Path) -> None:
    card = (exported / "hf/README.md").read_text()
    last = metrics(exported)[-1]
    for part in (
        "# A llada model, trained from scratch",
        "3 optimizer steps",
        f"| `loss` | {last['loss']:.6g} |",
        "60 sequences",
        f"torch {torch.__version__}",
        "\nloss_weight: token\n",
    ):
        assert part in card, part
    assert "EMA target encoder" in (exported / "hf_target/README.md").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}/hf", "{tmp}/out"], "is not a complete training checkpoint"),
        (["{run}/nothing", "{tmp}/out"], "nothing does not exist"),
        (["{run}/metrics.jsonl", "{tmp}/out"], "is a file"),
        (["{run}/checkpoints/latest", "{tmp}"], "already exists; nothing is overwritten"),
        (["{run}/checkpoints/latest", "{tmp}/out", "--like", "{tmp}/nowhere"], "nowhere is not a directory here"),
        (["{run}/checkpoints/latest", "{tmp}/out", "--like", "{assets}/dream_tiny"], "cannot be written like"),
    ],
)
def test_exports_that_are_refused(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    paths = {"run": exported, "tmp": tmp_path, "assets": Path(__file__).parents[1] / "assets"}
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["export", *(word.format(**paths) for word in words)])
    assert exit_info.value.code == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("builder", ["os.mkdir", "dllm_jepa.models.files._writer.shutil.os.mkdir"])
def test_a_checkpoint_cannot_name_code_to_run(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], builder: str
) -> None:
    """Its config names the tokenizer's builder; only our own are called, and not what can be reached by way of them."""
    checkpoint = Path(shutil.copytree(exported / "checkpoints/step_00000003", tmp_path / "foreign"))
    config = (checkpoint / "config.yaml").read_text()
    ours = "_component_: dllm_jepa.models.tiny.tiny_tokenizer"
    assert ours in config
    harm = f"_component_: {builder}\n  path: {tmp_path}/harm"
    forge(checkpoint, **{"config.yaml": config.replace(ours + "\n", harm + "\n").encode()})
    with pytest.raises(SystemExit):
        cli.main(["export", str(checkpoint), str(tmp_path / "out")])
    assert "code that a checkpoint names is not run" in capsys.readouterr().err
    assert not (tmp_path / "harm").exists() and not (tmp_path / "out").exists()


def test_a_run_that_started_from_a_checkpoint_exports_like_it(exported: Path, tmp_path: Path) -> None:
    base = exported / "hf"
    run_here(tmp_path / "run", f"checkpoint_dir={base}", "max_steps=2", "checkpoint.every_n_steps=2", "export=online")
    cli.main(["export", str(tmp_path / "run/checkpoints/latest"), str(tmp_path / "out")])
    for directory in (tmp_path / "run/hf", tmp_path / "out"):
        assert (directory / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        assert f"fine-tuned from `{base}`" in (directory / "README.md").read_text()
    weights = [load_hf(directory).state_dict() for directory in (tmp_path / "run/hf", tmp_path / "out")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_the_command_lists_checkpoints(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    (run / "checkpoints/step_00000004/state.json").unlink()
    for directory in (run, run / "checkpoints"):
        cli.main(["checkpoints", str(directory)])
        header, *lines = capsys.readouterr().out.splitlines()
        assert header.split() == ["STEP", "SAVED", "SIZE", "STATE"]
        assert [line.split()[0] for line in lines] == ["2", "4", "6"]
        assert [line.endswith("verified") for line in lines] == [True, False, True]
        assert "state.json is missing" in lines[1]
        size = sum(file.stat().st_size for file in (run / "checkpoints/step_00000002").iterdir())
        assert f"{size / 2**20:.1f} MiB" in lines[0]
    (tmp_path / "empty").mkdir()
    cli.main(["checkpoints", str(tmp_path / "empty")])
    assert "no training states" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["checkpoints", str(tmp_path / "nowhere")])
    assert "nowhere does not exist" in capsys.readouterr().err
