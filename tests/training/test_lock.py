"""One run at a time: against other processes, which is what the kernel's record locks are between."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from dllm_jepa.errors import LaunchError
from dllm_jepa.training import Ranks, _lock, locked
from dllm_jepa.training._lock import LOCK_NAME, RunLock


class OtherProcess:
    """A rank of another run, forked: takes its part of the lock and holds it until it is killed."""

    def __init__(self, directory: Path, *, rank: int) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                lock = RunLock(directory)
                lock.acquire() if rank == 0 else lock.join(rank)
                os.write(writing, b"held")
                time.sleep(60)
            finally:
                os._exit(1)
        os.close(writing)
        assert os.read(reading, 4) == b"held"
        os.close(reading)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_lock, "_PATIENCE_SECONDS", 0.5)


@pytest.mark.usefixtures("impatient")
def test_a_second_run_is_refused_by_name_of_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = OtherProcess(tmp_path, rank=0)
    start = time.monotonic()
    with pytest.raises(LaunchError, match=rf"in use by another run \(.*pid {other.pid}, since 20.*\); choose"):
        RunLock(tmp_path).acquire()
    assert time.monotonic() - start >= 0.5
    assert capsys.readouterr().err.count("waiting up to") == 1
    other.kill()
    RunLock(tmp_path).acquire()


def test_a_run_that_ends_in_time_is_waited_for(tmp_path: Path) -> None:
    other = OtherProcess(tmp_path, rank=0)
    subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {other.pid}"])
    lock = RunLock(tmp_path)
    lock.acquire()
    other.kill()
    assert f"pid {os.getpid()}" in (tmp_path / ".lock").read_text()
    lock.release(is_used=True)


@pytest.mark.usefixtures("impatient")
def test_any_rank_that_is_left_holds_the_lock(tmp_path: Path) -> None:
    """Rank zero of the other run has died; a rank that still runs might write into its checkpoint."""
    (tmp_path / ".lock").touch()
    left = OtherProcess(tmp_path, rank=5)
    with pytest.raises(LaunchError, match="in use by another run"):
        RunLock(tmp_path).acquire()
    left.kill()
    RunLock(tmp_path).acquire()


@pytest.mark.usefixtures("impatient")
def test_ranks_of_one_run_hold_it_together(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    other = OtherProcess(tmp_path, rank=1)  # beside rank zero
    with pytest.raises(LaunchError, match="rank 1 of another run still uses"):
        RunLock(tmp_path).join(1)
    lock.release(is_used=True)
    with pytest.raises(LaunchError, match="in use by another run"):
        RunLock(tmp_path).acquire()
    other.kill()
    RunLock(tmp_path).acquire()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    """Workers of a dataset, say, that outlive a killed rank."""
    reading, writing = os.pipe()
    run = os.fork()
    if run == 0:
        try:
            RunLock(tmp_path).acquire()
            if (child := os.fork()) == 0:
                time.sleep(60)
            os.write(writing, str(child).encode())
        finally:
            os._exit(0)
    os.close(writing)
    child = int(os.read(reading, 20))
    os.waitpid(run, 0)
    try:
        RunLock(tmp_path).acquire()
        os.kill(child, 0)  # it is still there
    finally:
        os.kill(child, 9)


@pytest.mark.usefixtures("impatient")
def test_what_was_made_for_the_lock_goes_unless_it_is_used(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "a" / "b")
    lock.acquire()
    (tmp_path / "a" / "note").touch()
    lock.release(is_used=False)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["a", "a/note"]
    lock = RunLock(tmp_path / "a" / "b")
    lock.acquire()
    lock.release(is_used=True)
    assert (tmp_path / "a" / "b" / ".lock").exists()


def test_a_rank_that_does_not_see_the_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"rank 3 on .* cannot open .*\.lock .* all machines share"):
        RunLock(tmp_path / "elsewhere").join(3)


def test_a_file_system_without_locks_is_no_obstacle_but_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(_lock.fcntl, "lockf", unsupported)
    RunLock(tmp_path).acquire()
    assert "file system without locks (No locks available)" in capsys.readouterr().err


def test_a_directory_that_is_gone_by_the_end(tmp_path: Path) -> None:
    """Rank zero removes what it made for nothing, maybe before another rank gets that far."""
    RunLock(tmp_path / "run").acquire()
    with locked(tmp_path / "run", Ranks(1, 2, torch.device("cpu"))):
        shutil.rmtree(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_directory_that_was_not_used_is_removed(tmp_path: Path) -> None:
    ranks = Ranks(0, 1, torch.device("cpu"))
    with locked(tmp_path / "a" / "run", ranks):
        assert (tmp_path / "a" / "run" / LOCK_NAME).exists()
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a" / "run", ranks):
        (tmp_path / "a" / "run" / "result").write_text("kept")
    assert (tmp_path / "a" / "run" / "result").exists()
