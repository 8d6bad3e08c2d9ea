"""Saving: what is kept, and a copy that the run cannot change any more."""

import threading
from pathlib import Path

import pytest
import torch

from dllm_jepa.errors import CheckpointError
from dllm_jepa.training import SavedCheckpoint, list_checkpoints
from dllm_jepa.training.checkpoint import _dcp
from tests.training.small_checkpoints import ONE_PROCESS, save, tensors, writer


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, {2, 4, 6, 8, 10, 12}),
        ({"keep_last": 1}, {12}),
        ({"keep_last": 2}, {10, 12}),
        ({"keep_last": 9}, {2, 4, 6, 8, 10, 12}),
        ({"keep_last": 1, "keep_every": 4}, {4, 8, 12}),
        ({"keep_last": 2, "keep_every": 6}, {6, 10, 12}),
        ({"keep_every": 6}, {2, 4, 6, 8, 10, 12}),
    ],
)
def test_retention(tmp_path: Path, options: dict[str, int], kept: set[int]) -> None:
    steps = range(2, 14, 2)
    for step in steps:
        save(tmp_path, step, **options)
    assert {int(path.name[5:]) for path in list_checkpoints(tmp_path)} == kept
    assert len(list(tmp_path.iterdir())) == len(kept) + 1  # and the link: nothing half removed is left
    assert (tmp_path / "latest").resolve().name == "step_00000012"


def test_steps_of_more_digits_come_later(tmp_path: Path) -> None:
    for step in (99_999_998, 100_000_000):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_99999998", "step_100000000"]


@pytest.mark.parametrize(
    ("every", "due"), [(None, set()), (3, {3, 6, 7}), (7, {7}), (1, {1, 2, 3, 4, 5, 6, 7}), (9, {7})]
)
def test_a_checkpoint_is_due_every_so_many_steps_and_at_the_end(
    tmp_path: Path, every: int | None, due: set[int]
) -> None:
    saver = writer(tmp_path, every_n_steps=every)
    assert {step for step in range(1, 8) if saver.is_due(step, num_steps=7)} == due


def test_the_same_step_is_saved_once(tmp_path: Path) -> None:
    saver = writer(tmp_path)
    saver.save(3, tensors(3), {})
    before = (tmp_path / "step_00000003" / "state.json").stat().st_mtime_ns
    saver.save(3, tensors(3), {})
    assert (tmp_path / "step_00000003" / "state.json").stat().st_mtime_ns == before


def test_a_complete_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    before = {file: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(CheckpointError, match="step_00000003 exists already"):
        save(tmp_path, 3)
    assert {file: file.read_bytes() for file in path.iterdir()} == before


class SlowDisk:
    """Holds every save back until it is released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.released = threading.Event()
        self.threads: list[str] = []
        really_save = _dcp.write_tensors

        def save_later(*args, **kwargs) -> None:
            self.threads.append(threading.current_thread().name)
            assert self.released.wait(30)
            really_save(*args, **kwargs)

        monkeypatch.setattr(_dcp, "write_tensors", save_later)


def test_an_asynchronous_save_is_of_the_step_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk(monkeypatch)
    saver = writer(tmp_path, async_save=True)
    for step in (1, 2):
        disk.released.clear()
        live = tensors(step)
        saver.save(step, live, {})
        assert len(list_checkpoints(tmp_path)) == step - 1  # it returned before anything was written
        for tensor in live.values():
            tensor.fill_(-1.0)
        disk.released.set()
        saver.finish()
        saved = SavedCheckpoint(tmp_path / f"step_{step:08d}")
        for name, expected in tensors(step).items():
            assert torch.equal(saved.read(name, torch.float32), expected), name
    saver.close()
    assert all(name.startswith("checkpoint") for name in disk.threads) and len(disk.threads) == 2


def test_one_save_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SlowDisk(monkeypatch)
    saver = writer(tmp_path, async_save=True)
    saver.save(1, tensors(1), {})
    threading.Timer(0.2, disk.released.set).start()
    saver.save(2, tensors(2), {})  # waits for the first one
    assert [path.name for path in list_checkpoints(tmp_path)][:1] == ["step_00000001"]
    saver.close()
    assert len(list_checkpoints(tmp_path)) == 2


def test_a_failed_asynchronous_save_is_raised_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_dcp, "write_tensors", fail)
    saver = writer(tmp_path, async_save=True)
    saver.save(1, tensors(1), {})
    with pytest.raises(CheckpointError, match="step_00000001 could not be written.*No space left"):
        saver.save(2, tensors(2), {})
    saver.save(3, tensors(3), {})
    saver.close()  # after a run that has failed for a reason of its own
    assert "the last checkpoint was not completed: checkpoint" in capsys.readouterr().err


def test_quantized_optimizer_states_are_copied(tmp_path: Path) -> None:
    """torchao's tensor subclasses have no clone of their own."""
    from torchao.optim.subclass_8bit import OptimState8bit

    live = OptimState8bit.zeros((32, 128), True, 256)
    live.codes.random_(0, 255)
    live.scale.uniform_(0.5, 1.0)
    codes, scale = live.codes.clone(), live.scale.clone()
    saver = writer(tmp_path, async_save=True)
    saver.save(1, {"state": live}, {})
    live.codes.zero_()
    saver.close()
    into = OptimState8bit.zeros((32, 128), True, 256)
    SavedCheckpoint(tmp_path / "step_00000001").read_into({"state": into}, ONE_PROCESS)
    assert torch.equal(into.codes, codes) and torch.equal(into.scale, scale)
