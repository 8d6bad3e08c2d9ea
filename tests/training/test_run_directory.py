"""The output directory: never two runs in one, and metrics without gap or repetition after a restart."""

import json
from pathlib import Path

import pytest

from dllm_jepa.errors import CheckpointError, LaunchError
from dllm_jepa.training import RunDirectory


def checkpoint(output_dir: Path, step: int) -> Path:
    """A training state as far as the directory looks at it."""
    directory = output_dir / "checkpoints" / f"step_{step:08d}"
    directory.mkdir(parents=True)
    (directory / "state.json").write_text(json.dumps({"step": step}))
    return directory


def run_for(output_dir: Path, steps: int, resume: str = "never") -> RunDirectory:
    run = RunDirectory(output_dir, resume)
    run.open("a: 1\n")
    for step in range(run.start_step, run.start_step + steps):
        run.append_metrics({"step": step + 1, "loss": 0.1 * step})
    return run


def steps_in(output_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def tree(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*"))


def test_a_fresh_run(tmp_path: Path) -> None:
    output_dir = tmp_path / "not" / "there" / "yet"
    run = RunDirectory(output_dir, "never")
    assert not output_dir.exists()
    assert (run.start_step, run.resume_from) == (0, None)
    run.open("key: value\n")
    run.append_metrics({"step": 1, "loss": 1.5})
    run.append_metrics({"step": 2, "loss": 1.0})
    assert (output_dir / "config.yaml").read_text() == "key: value\n"
    assert run.export == output_dir / "hf" and run.checkpoints == output_dir / "checkpoints"
    assert [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 1.5},
        {"step": 2, "loss": 1.0},
    ]


def test_a_run_that_died_before_its_first_step_holds_nothing(tmp_path: Path) -> None:
    run_for(tmp_path, 0)
    run_for(tmp_path, 1)
    assert steps_in(tmp_path) == [1]


def test_a_finished_run_is_known_by_its_export(tmp_path: Path) -> None:
    run_for(tmp_path, 1)
    assert not RunDirectory(tmp_path, "auto").is_finished
    (tmp_path / "hf").mkdir()
    assert RunDirectory(tmp_path, "auto").is_finished


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_an_existing_directory_with_other_files_is_fine(tmp_path: Path, resume: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run_for(tmp_path, 1, resume)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("held", ["metrics.jsonl", "checkpoints", "hf"])
def test_a_directory_that_holds_a_run_is_refused(tmp_path: Path, held: str) -> None:
    (tmp_path / held).mkdir() if "." not in held else (tmp_path / held).write_text("")
    before = tree(tmp_path)
    with pytest.raises(LaunchError, match=rf"output_dir=.* already holds a run \({held}\); nothing is overwritten"):
        RunDirectory(tmp_path, "never")
    assert tree(tmp_path) == before


def test_a_finished_run_is_refused_with_all_it_holds(tmp_path: Path) -> None:
    run_for(tmp_path, 2)
    with pytest.raises(LaunchError, match=r"\(metrics.jsonl\)"):
        RunDirectory(tmp_path, "never")
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.parametrize("resume", ["never", "auto"])
def test_a_file_in_its_place_is_refused(tmp_path: Path, resume: str) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(LaunchError, match="out is a file; choose another directory"):
        RunDirectory(tmp_path / "out", resume)


def test_auto_takes_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    run_for(tmp_path, 12)
    checkpoint(tmp_path, 4)
    newest = checkpoint(tmp_path, 10)
    (tmp_path / "checkpoints" / "step_00000012.unfinished").mkdir()
    run = RunDirectory(tmp_path, "auto")
    assert (run.resume_from, run.start_step) == (newest, 10)


def test_auto_without_a_checkpoint_starts_over(tmp_path: Path) -> None:
    """A run that died before its first checkpoint."""
    run_for(tmp_path, 3)
    assert RunDirectory(tmp_path, "auto").resume_from is None
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
    before = (tree(tmp_path), (tmp_path / "metrics.jsonl").read_text())
    RunDirectory(tmp_path, "auto")
    assert (tree(tmp_path), (tmp_path / "metrics.jsonl").read_text()) == before


def test_resume_by_path(tmp_path: Path) -> None:
    run_for(tmp_path, 9)
    early = checkpoint(tmp_path, 4)
    run = RunDirectory(tmp_path, str(early))
    assert (run.resume_from, run.start_step) == (early, 4)
    run_for(tmp_path, 1, str(early))
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]


def test_only_a_run_with_a_checkpoint_is_offered_to_resume(tmp_path: Path) -> None:
    run_for(tmp_path, 5)
    with pytest.raises(LaunchError) as error:
        RunDirectory(tmp_path, "never")
    assert "resume=auto" not in str(error.value)
    checkpoint(tmp_path, 4)
    with pytest.raises(LaunchError, match="or go on with it by resume=auto"):
        RunDirectory(tmp_path, "never")


def test_a_branch_among_later_checkpoints_is_refused(tmp_path: Path) -> None:
    run_for(tmp_path, 9)
    early, late = checkpoint(tmp_path, 4), checkpoint(tmp_path, 8)
    with pytest.raises(LaunchError, match=f"holds training states after .*: {late.name};"):
        RunDirectory(tmp_path, str(early))
    assert RunDirectory(tmp_path, str(late)).start_step == 8


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match=r"cannot be made: .*file is not a folder"):
        RunDirectory(tmp_path / "file" / "run", "never")


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


def test_metrics_that_end_before_the_checkpoint_are_refused(tmp_path: Path) -> None:
    run_for(tmp_path, 3)
    checkpoint(tmp_path, 5)
    with pytest.raises(CheckpointError, match="metrics.jsonl ends at step 3, before the checkpoint's step 5"):
        RunDirectory(tmp_path, "auto").open("a: 2\n")
    assert steps_in(tmp_path) == [1, 2, 3]
    assert (tmp_path / "config.yaml").read_text() == "a: 1\n"


def test_a_torn_line_before_the_checkpoint_is_refused(tmp_path: Path) -> None:
    run = run_for(tmp_path, 4)
    run.metrics.write_text(run.metrics.read_text().rstrip("\n"))
    checkpoint(tmp_path, 4)
    with pytest.raises(CheckpointError, match="ends at step 3, before the checkpoint's step 4"):
        RunDirectory(tmp_path, "auto").open("a: 2\n")


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="resume=.*nowhere: there is no such checkpoint directory"):
        RunDirectory(tmp_path, str(tmp_path / "nowhere"))


@pytest.mark.parametrize("state", [None, "{", "[]", '{"step": "4"}', "{}"])
def test_an_incomplete_checkpoint_is_refused(tmp_path: Path, state: str | None) -> None:
    directory = checkpoint(tmp_path, 4)
    (directory / "state.json").unlink()
    if state is not None:
        (directory / "state.json").write_text(state)
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="not a complete training checkpoint|names no step"):
        RunDirectory(tmp_path, "auto")
    assert tree(tmp_path) == before
