"""The output directory: never two runs in one, and metrics without gap or repetition after a restart."""

import json
from pathlib import Path

import pytest

from dllm_jepa.errors import CheckpointError, ConfigError, LaunchError, LostRankError
from dllm_jepa.training import Ranks, RunDirectory, Stopped
from tests.training.small_checkpoints import ONE_PROCESS, flip_a_byte, save


def directory(output_dir: Path, resume: str = "never", **options) -> RunDirectory:
    return RunDirectory(output_dir, resume, ONE_PROCESS, **options)


def checkpoint(output_dir: Path, step: int) -> Path:
    return save(output_dir / "checkpoints", step)


def run_for(output_dir: Path, steps: int, resume: str = "never", *, ends: bool = False) -> RunDirectory:
    """A run that does some steps, and then dies or ends."""
    run = directory(output_dir, resume)
    run.open("a: 1\n")
    for step in range(run.start_step, run.start_step + steps):
        run.metrics.append({"step": step + 1, "loss": 0.1 * step})
    if ends:
        with run:
            pass
    return run


def steps_in(output_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def status(output_dir: Path) -> dict:
    return json.loads((output_dir / "status.json").read_text())


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything below a folder but the lock."""
    files = (file for file in path.rglob("*") if file.name != ".lock")
    return {str(file.relative_to(path)): file.read_bytes() if file.is_file() else None for file in files}


def test_a_fresh_run(tmp_path: Path) -> None:
    output_dir = tmp_path / "not" / "there" / "yet"
    run = directory(output_dir)
    assert (run.start_step, run.resume_from) == (0, None)
    run.open("key: value\n")
    run.metrics.append({"step": 1, "loss": 1.5})
    run.metrics.append({"step": 2, "loss": 1.0})
    assert (output_dir / "config.yaml").read_text() == "key: value\n"
    folders = {"online": "hf", "target": "hf_target", "adapter": "adapter", "adapter_target": "adapter_target"}
    assert run.exports == {part: output_dir / folder for part, folder in folders.items()}
    assert run.checkpoints == output_dir / "checkpoints"
    assert [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 1.5},
        {"step": 2, "loss": 1.0},
    ]


def test_a_run_that_died_before_its_first_step_holds_nothing(tmp_path: Path) -> None:
    run_for(tmp_path, 0)
    run_for(tmp_path, 1)
    assert steps_in(tmp_path) == [1]


def test_a_claim_that_comes_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), directory(tmp_path / "not" / "there"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with directory(tmp_path / "there"):
        pass
    assert list((tmp_path / "there").iterdir()) == []


def test_status_says_how_the_run_stands(tmp_path: Path) -> None:
    run_for(tmp_path, 3)
    assert (status(tmp_path)["state"], status(tmp_path)["step"]) == ("running", 0)
    saved = checkpoint(tmp_path, 2)
    with pytest.raises(ZeroDivisionError), directory(tmp_path, "auto") as run:
        run.open("a: 1\n")
        raise ZeroDivisionError("by zero")
    state = status(tmp_path)
    assert (state["state"], state["reason"], state["step"]) == ("failed", "ZeroDivisionError: by zero", 2)
    assert state["checkpoint"] == str(saved)
    with pytest.raises(SystemExit) as exit_info, directory(tmp_path, "auto") as run:
        run.open("a: 1\n")
        run.metrics.append({"step": 3})
        raise Stopped("SIGUSR1")
    assert exit_info.value.code == 75
    state = status(tmp_path)
    assert (state["state"], state["reason"], state["step"]) == ("stopped", "SIGUSR1", 3)


class FirstSurvivor(Ranks):
    """Rank 1, when rank zero has ended."""

    def lost(self, error: BaseException) -> tuple[LostRankError, bool] | None:
        return LostRankError("rank 0 has ended"), True


def test_a_survivor_records_the_loss_unless_the_lost_rank_has_said_why(tmp_path: Path) -> None:
    survivor = RunDirectory(tmp_path, "never", ONE_PROCESS)
    survivor.open("a: 1\n")
    survivor._ranks = FirstSurvivor(1, 2, ONE_PROCESS.device)
    with pytest.raises(LostRankError), survivor:
        raise RuntimeError("connection closed by peer")
    assert (status(tmp_path)["state"], status(tmp_path)["reason"]) == ("failed", "rank 0 has ended")
    (tmp_path / "status.json").write_text('{"state": "failed", "reason": "disk full", "step": 0}')
    with pytest.raises(LostRankError), survivor:
        raise RuntimeError("connection closed by peer")
    assert status(tmp_path)["reason"] == "disk full"


def test_a_finished_run_is_known_by_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_for(tmp_path, 4)
    assert not directory(tmp_path, "auto").is_finished(4, [])
    run_for(tmp_path, 4, "auto", ends=True)
    assert directory(tmp_path, "auto").is_finished(None, [])
    assert directory(tmp_path, "auto").is_finished(4, [])
    said = capsys.readouterr().out
    assert "holds a finished run of 4 steps: nothing to do. To go on to step 8" in said
    assert "max_steps=8 resume=auto resume_override=true\n" in said
    assert not directory(tmp_path, "auto").is_finished(5, [])


def test_a_damaged_status_is_not_relied_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_for(tmp_path, 2, ends=True)
    (tmp_path / "status.json").write_bytes(b'{"state": "fini\xff')
    assert not directory(tmp_path, "auto").is_finished(2, [])
    assert "status.json is damaged" in capsys.readouterr().err


def test_an_export_is_not_overwritten_by_going_on(tmp_path: Path) -> None:
    run_for(tmp_path, 3)
    checkpoint(tmp_path, 3)
    (tmp_path / "hf").mkdir()
    run = directory(tmp_path, "auto")
    run.check_steps(3)  # only what is missing of the export is left to do
    with pytest.raises(LaunchError, match="the export of a run that came to its end. To go on to step 4"):
        run.check_steps(4)
    with pytest.raises(ConfigError, match="is past the last of 2 steps: raise max_steps"):
        run.check_steps(2)


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_adding_steps_to_a_finished_run_is_a_line_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str
) -> None:
    """Whether the run was asked to go on or started again; with the export moved aside, to a name that is free."""
    run_for(tmp_path, 3, ends=True)
    checkpoint(tmp_path, 3)
    for name in ("hf", "hf_before"):
        (tmp_path / name).mkdir()
    (tmp_path / "my_recipe.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    words = [str(tmp_path / "my_recipe.py"), "--config", "tiny", "task={a: 1}", "max_steps=7", f"resume={resume}"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(LaunchError) as error:
        directory(tmp_path, resume).is_finished(7, ["online"])
    assert str(error.value).split("\n")[1:] == [
        f"  mv {tmp_path}/hf {tmp_path}/hf_before2",
        "  tune run --nproc_per_node 2 my_recipe.py --config tiny 'task={a: 1}' max_steps=7 resume=auto "
        "resume_override=true",
    ]


def test_steps_cannot_be_added_without_a_training_state(tmp_path: Path) -> None:
    run_for(tmp_path, 3, ends=True)
    (tmp_path / "hf").mkdir()
    with pytest.raises(LaunchError, match="saved no training state, .* with checkpoint_dir=.*hf and an output_dir"):
        directory(tmp_path, "auto").is_finished(6, ["online"])


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_an_existing_directory_with_other_files_is_fine(tmp_path: Path, resume: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run_for(tmp_path, 1, resume)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("held", ["metrics.jsonl", "checkpoints", "hf", "hf_target", "adapter", "adapter_target"])
def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path, held: str) -> None:
    (tmp_path / held).mkdir() if "." not in held else (tmp_path / held).write_text("")
    if held == "checkpoints":
        checkpoint(tmp_path, 1)
    before = tree(tmp_path)
    with pytest.raises(LaunchError, match=rf"output_dir=.* already holds a run \({held}\); nothing is overwritten"):
        directory(tmp_path, "never")
    assert tree(tmp_path) == before


def test_a_finished_run_is_refused_with_all_it_holds(tmp_path: Path) -> None:
    run_for(tmp_path, 2)
    with pytest.raises(LaunchError, match=r"\(metrics.jsonl\)"):
        directory(tmp_path, "never")
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_file_in_its_place_is_refused(tmp_path: Path, resume: str) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(LaunchError, match="out is a file; choose another directory"):
        directory(tmp_path / "out", resume)


def test_auto_takes_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    run_for(tmp_path, 12)
    checkpoint(tmp_path, 4)
    newest = checkpoint(tmp_path, 10)
    (tmp_path / "checkpoints" / "step_00000012.unfinished").mkdir()
    run = directory(tmp_path, "auto")
    assert run.resume_from is not None
    assert (run.resume_from.path, run.start_step) == (newest, 10)
    run.open("a: 1\n")
    assert not (tmp_path / "checkpoints" / "step_00000012.unfinished").exists()


def test_auto_without_a_checkpoint_starts_over(tmp_path: Path) -> None:
    """A run that died before its first checkpoint."""
    run_for(tmp_path, 3)
    assert directory(tmp_path, "auto").resume_from is None
    run_for(tmp_path, 2, "auto")
    assert steps_in(tmp_path) == [1, 2]


def test_a_resumed_run_cuts_off_what_it_will_do_again(tmp_path: Path) -> None:
    """Eleven steps done, the last checkpoint after 8; the last line was being written when the run died."""
    run_for(tmp_path, 11)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    checkpoint(tmp_path, 8)
    run_for(tmp_path, 4, "auto")
    assert steps_in(tmp_path) == list(range(1, 13))


def test_looking_at_a_run_to_resume_writes_nothing(tmp_path: Path) -> None:
    run_for(tmp_path, 5)
    checkpoint(tmp_path, 3)
    before = tree(tmp_path)
    directory(tmp_path, "auto")
    assert tree(tmp_path) == before


def test_resume_by_path(tmp_path: Path) -> None:
    run_for(tmp_path, 9)
    early = checkpoint(tmp_path, 4)
    run = directory(tmp_path, str(early))
    assert run.resume_from is not None
    assert (run.resume_from.path, run.start_step) == (early, 4)
    run_for(tmp_path, 1, str(early))
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]


def test_only_a_run_with_a_checkpoint_is_offered_to_resume(tmp_path: Path) -> None:
    run_for(tmp_path, 5)
    with pytest.raises(LaunchError) as error:
        directory(tmp_path, "never")
    assert "resume=auto" not in str(error.value)
    checkpoint(tmp_path, 4)
    with pytest.raises(LaunchError, match="or go on with it by resume=auto"):
        directory(tmp_path, "never")


def test_a_branch_among_later_checkpoints_is_refused(tmp_path: Path) -> None:
    run_for(tmp_path, 9)
    early, late = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    with pytest.raises(LaunchError, match=f"holds training states after .*: {late.name};"):
        directory(tmp_path, str(early))
    assert directory(tmp_path, str(late)).start_step == 8


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=r"cannot be made: .*file is not a folder"):
        directory(tmp_path / "file" / "run")


def test_resume_another_run_into_a_fresh_directory(tmp_path: Path) -> None:
    run_for(tmp_path / "old", 6)
    run_for(tmp_path / "new", 2, str(checkpoint(tmp_path / "old", 6)))
    assert steps_in(tmp_path / "new") == [7, 8]
    assert steps_in(tmp_path / "old") == [1, 2, 3, 4, 5, 6]


def test_a_run_that_began_from_another_one_is_resumed_in_turn(tmp_path: Path) -> None:
    """Its first row is of step 7: also when it dies before that row is written."""
    start = str(checkpoint(tmp_path / "old", 6))
    run_for(tmp_path / "new", 0, start)
    run_for(tmp_path / "new", 4, start)
    assert steps_in(tmp_path / "new") == [7, 8, 9, 10]
    checkpoint(tmp_path / "new", 8)
    run_for(tmp_path / "new", 1, "auto")
    assert steps_in(tmp_path / "new") == [7, 8, 9]


@pytest.mark.parametrize(
    ("spoil", "problem", "left"),
    [
        (lambda lines: lines[:3], "no row of step 4 and 1 more", [1, 2, 3]),
        (lambda lines: [*lines[:4], lines[4].rstrip()], "no row of step 5", [1, 2, 3, 4]),
        (lambda lines: [*lines[:2], "\xff\xfe{\n", *lines[2:]], "line 3 cannot be read", [1, 2, 3, 4, 5]),
        (lambda lines: [lines[0], "{}\n", *lines[2:]], "line 2 cannot be read; no row of step 2", [1, 3, 4, 5]),
    ],
    ids=["short", "torn", "a line too many", "a line lost"],
)
def test_damaged_metrics_are_named_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil, problem: str, left: list[int]
) -> None:
    run_for(tmp_path, 6)
    checkpoint(tmp_path, 5)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    spoilt = "".join(spoil(lines)).encode("latin-1")
    (tmp_path / "metrics.jsonl").write_bytes(spoilt)
    run_for(tmp_path, 1, "auto")
    assert f"metrics.jsonl is damaged ({problem}): it is kept as metrics.jsonl.damaged" in capsys.readouterr().err
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == spoilt
    assert steps_in(tmp_path) == [*left, 6]


def test_a_damaged_checkpoint_is_named_passed_over_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_for(tmp_path, 9)
    for step in (3, 6, 8):
        checkpoint(tmp_path, step)
    for step in (6, 8):
        flip_a_byte(tmp_path / "checkpoints" / f"step_{step:08d}" / "__0_0.distcp", 700)
    spoilt = tree(tmp_path / "checkpoints" / "step_00000006")
    before = tree(tmp_path)
    run = directory(tmp_path, "auto")
    assert run.start_step == 3
    assert tree(tmp_path) == before  # until the run goes on
    run.open("a: 1\n")
    message = capsys.readouterr().err
    assert "step_00000006 is damaged: __0_0.distcp does not match its checksum; it is kept as" in message
    assert "going on from" in message and "step_00000003, step 3" in message
    assert tree(tmp_path / "checkpoints" / "step_00000006.damaged") == spoilt
    checkpoint(tmp_path, 6)  # its name is free again
    flip_a_byte(tmp_path / "checkpoints" / "step_00000006" / "__0_0.distcp", 700)
    directory(tmp_path, "auto").open("a: 1\n")
    assert (tmp_path / "checkpoints" / "step_00000006.damaged2").exists()


def test_without_an_intact_checkpoint_nothing_goes_on(tmp_path: Path) -> None:
    run_for(tmp_path, 6)
    for step in (3, 5):
        (checkpoint(tmp_path, step) / ".metadata").unlink()
    before = tree(tmp_path)
    with pytest.raises(CheckpointError) as error:
        directory(tmp_path, "auto")
    for line in ("no checkpoint in", "step_00000003 is damaged: .metadata is missing", "step_00000005 is damaged"):
        assert line in str(error.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere does not exist"),
        ("metrics.jsonl", "metrics.jsonl is a file, not a checkpoint directory"),
        (".", "holds checkpoints but is none itself; give one of them, such as .*step_00000004"),
        ("checkpoints", "holds checkpoints but is none itself"),
        ("empty", "empty is not a complete training checkpoint: it has no manifest.json"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, name: str, message: str) -> None:
    run_for(tmp_path, 4)
    checkpoint(tmp_path, 4)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=message):
        directory(tmp_path, str(tmp_path / name))


def test_the_link_to_the_newest_checkpoint_can_be_named(tmp_path: Path) -> None:
    run_for(tmp_path, 4)
    for step in (2, 4):
        checkpoint(tmp_path, step)
    assert directory(tmp_path, str(tmp_path / "checkpoints" / "latest")).start_step == 4


def test_checkpoints_may_stand_elsewhere(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    run = directory(tmp_path / "run", checkpoints=elsewhere)
    run.open("a: 1\n")
    save(elsewhere, 4)
    assert directory(tmp_path / "run", "auto", checkpoints=elsewhere).start_step == 4
    with pytest.raises(LaunchError, match=r"already holds a run \(elsewhere\)"):
        directory(tmp_path / "other", checkpoints=elsewhere)
    assert not (tmp_path / "other").exists()
