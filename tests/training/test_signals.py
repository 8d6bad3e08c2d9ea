"""Signals: noted, agreed on, and given back."""

import os
import signal
import time

import pytest

from dllm_jepa.training import STOPPED_EXIT_CODE, Ranks, Stopped, StopSignals
from tests.launching import on_ranks
from tests.training.small_checkpoints import ONE_PROCESS


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_remembered_until_it_is_asked_for(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    with StopSignals(ONE_PROCESS) as signals:
        signals.defer()
        assert signals.agreed() is None
        os.kill(os.getpid(), signal.Signals[name])
        assert signals.agreed() == signals.agreed() == name
    assert {number: signal.getsignal(number) for number in before} == before
    assert f"{name}: finishing the step, then saving" in capfd.readouterr().err


def test_stopping_is_an_exit_with_a_code_of_its_own() -> None:
    with pytest.raises(SystemExit) as exit_info:
        raise Stopped("SIGTERM")
    assert exit_info.value.code == STOPPED_EXIT_CODE == 75


def test_a_second_sigint_ends_the_process_at_once() -> None:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with StopSignals(Ranks.join("cpu")) as signals:
                signals.defer()
                os.write(writing, b"ready")
                deadline = time.monotonic() + 60
                while time.monotonic() < deadline:
                    time.sleep(0.01)
        finally:
            os._exit(0)
    assert os.read(reading, 5) == b"ready"
    os.kill(pid, signal.SIGINT)
    time.sleep(0.5)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0)
    os.kill(pid, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGINT


def test_before_the_first_step_ctrl_c_ends_the_run(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info, StopSignals(ONE_PROCESS):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)
    assert exit_info.value.code == 130
    assert capfd.readouterr().err == "\nSIGINT: stopped before the first step, nothing to save\n"


def interrupt_while_waiting() -> None:
    """Rank zero works while the other one waits for it; then both get the signal, as under torchrun."""
    with Ranks.join("cpu") as ranks, StopSignals(ranks):
        pids = ranks.gather_objects(os.getpid())

        def work() -> None:
            time.sleep(0.5)  # the other one is waiting now
            for pid in reversed(pids):
                os.kill(pid, signal.SIGINT)
            time.sleep(30)

        ranks.on_rank_zero(work)


def test_before_the_first_step_ctrl_c_ends_ranks_that_wait() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError) as failure:
        on_ranks(2, interrupt_while_waiting)
    assert "signal SIGINT" in str(failure.value) or "exit code 130" in str(failure.value)
    assert str(failure.value).count("SIGINT: stopped before the first step") == 1
    assert "Traceback" not in str(failure.value)
    assert time.monotonic() - start < 100  # not the minutes after which they would give up, but with their imports
