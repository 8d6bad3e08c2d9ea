"""Two ranks, stopped, killed and restarted under torchrun, and resumed on another number of ranks.

Every run goes on to the end of the same 24 steps and is compared with one that was never interrupted.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from dllm_jepa.errors import CheckpointError
from dllm_jepa.training import SavedCheckpoint
from tests.launching import (
    ROOT,
    SMALL,
    assert_same_state,
    copy_up_to,
    metrics,
    on_ranks,
    run_here,
    run_on_ranks,
    status,
    without_time,
)

STEPS = 24
# At a small rate rounding does not grow much over the steps that runs on other numbers of ranks are compared over.
RUN = (f"lr_scheduler.num_training_steps={STEPS}", "checkpoint.every_n_steps=4", "optimizer.lr=1e-4")
KEPT = (*RUN, "checkpoint.keep_last=null")
LONG, SHORT = f"max_steps={STEPS}", "max_steps=12"
EIGHT_BIT = ("max_steps=4", "checkpoint.every_n_steps=2", "checkpoint.keep_last=null", "lr_scheduler=null")
EIGHT_BIT += ("optimizer={_component_: torchao.optim.AdamW8bit, lr: 1e-3}",)
SAME_EVERYWHERE = ("step", "epoch", "lr", "tokens", "masked_tokens", "sequences")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


class Launched:
    """A run of two ranks that is going on."""

    def __init__(self, output_dir: Path, *overrides: str, options: tuple[str, ...] = ()) -> None:
        self.output_dir = output_dir
        path = os.pathsep.join(map(str, (ROOT, ROOT / "recipes")))
        self.log = output_dir.with_suffix(".log").open("w+")
        self.process = subprocess.Popen(
            [*TORCHRUN, *options, "-m", "dllm_jepa_full", *SMALL, f"output_dir={output_dir}", *overrides],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait_for(self, what: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline and self.process.poll() is None, self.output()
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: steps_done(self.output_dir) >= step)

    def ranks(self) -> list[int]:
        """Process ids of the ranks."""
        return [pid for pid in processes_of(self.output_dir) if pid != self.process.pid]

    def output(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def end(self) -> int:
        code = self.process.wait(120)
        self.log.close()
        return code


def steps_done(output_dir: Path) -> int:
    file = output_dir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def processes_of(output_dir: Path) -> list[int]:
    """Everything that runs with this output_dir on its command line."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
            if f"output_dir={output_dir}".encode() in words and "Z" not in (entry / "stat").read_text().split()[2]:
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return sorted(found)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs")
    run_here(directory / "one", *KEPT, SHORT)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TORCHDYNAMO_DISABLE", "1")  # torchao would compile its step of 8 bits for half a minute
        run_on_ranks(
            2,
            {
                directory / "two": [*KEPT, LONG],
                directory / "asynchronous": [*KEPT, SHORT, "checkpoint.async_save=true"],
                directory / "eight_bit": [*EIGHT_BIT],
                directory / "eight_bit_half": [*EIGHT_BIT, "max_steps=2"],
            },
        )
        for name, saved in (("two_to_one", "two"), ("one_to_two", "one")):
            copy_up_to(directory / saved, directory / name, step=4)
        run_on_ranks(
            2,
            {
                directory / "one_to_two": [*KEPT, SHORT, "resume=auto"],
                directory / "eight_bit_half": [*EIGHT_BIT, "resume=auto"],
            },
        )
    run_here(directory / "two_to_one", *KEPT, SHORT, "resume=auto")
    return directory


@pytest.mark.slow
def test_stopped_and_killed_in_every_way_it_is_the_same_run(tmp_path: Path, runs: Path) -> None:
    run = tmp_path / "run"
    launched = Launched(run, *RUN, LONG)
    launched.wait_for_step(2)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.end() == 1
    step = steps_done(run)
    assert (status(run)["state"], status(run)["reason"], status(run)["step"]) == ("stopped", "SIGTERM", step)
    assert status(run)["checkpoint"] == str(run / f"checkpoints/step_{step:08d}")

    # A rank is killed: the other one says which, and torchrun starts both again.
    launched = Launched(run, *RUN, LONG, "resume=auto", options=("--max-restarts=2",))
    for victim in (0, 1):
        launched.wait_for_step(step + 2)
        ranks = launched.ranks()
        assert len(ranks) == 2
        os.kill(ranks[victim], signal.SIGKILL)
        said = f"pid {ranks[victim]}) has ended: the others cannot go on without it"
        launched.wait_for(lambda said=said: said in launched.output(), seconds=30)
        assert f"rank {victim} (" in launched.output()
        launched.wait_for(lambda ranks=ranks: not {*ranks} & {*launched.ranks()})
        step = steps_done(run)

    # The launcher is killed: nothing is left behind.
    launched.wait_for_step(step + 2)
    assert len(launched.ranks()) == 2
    launched.process.kill()
    deadline = time.monotonic() + 10
    while processes_of(run) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(run) == []
    assert launched.end() == -signal.SIGKILL

    run_on_ranks(2, {run: [*RUN, LONG, "resume=auto"]})
    assert [row["step"] for row in metrics(run)] == list(range(1, STEPS + 1))
    assert without_time(metrics(run)) == without_time(metrics(runs / "two"))
    assert_same_state(run, runs / "two", STEPS)
    assert status(run)["state"] == "finished"


def test_asynchronous_saves_of_two_ranks_are_the_same_states(runs: Path) -> None:
    assert without_time(metrics(runs / "asynchronous")) == without_time(metrics(runs / "two"))[:12]
    for step in (4, 8, 12):
        assert_same_state(runs / "asynchronous", runs / "two", step)


@pytest.mark.parametrize(("run", "reference"), [("two_to_one", "two"), ("one_to_two", "one")])
def test_another_number_of_ranks_goes_on_with_the_same_run(runs: Path, run: str, reference: str) -> None:
    rows, expected = metrics(runs / run), metrics(runs / reference)[:12]
    assert [row["step"] for row in rows] == [*range(1, 13)]
    for row, other in zip(rows, expected, strict=True):
        assert {key: row[key] for key in SAME_EVERYWHERE} == {key: other[key] for key in SAME_EVERYWHERE}
    for row, other in zip(rows[4:], expected[4:], strict=True):
        for key in ("loss", "diffusion_loss", "jepa_loss", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-5, abs=0), (row["step"], key)


def test_quantized_optimizer_states_go_on_bit_for_bit(runs: Path) -> None:
    """torchao AdamW8bit on sharded fp32 weights."""
    assert without_time(metrics(runs / "eight_bit_half")) == without_time(metrics(runs / "eight_bit"))
    saved = (runs / name / "checkpoints/step_00000004" for name in ("eight_bit_half", "eight_bit"))
    half, whole = (SavedCheckpoint(path).files for path in saved)
    written = [name for name in whole if name.endswith(".distcp")]  # to read them as tensors takes torchao
    assert len(written) == 2 and [half[name] for name in written] == [whole[name] for name in written]


def fail_to_export(output_dir: Path, export: str) -> None:
    """A rank of a run whose exports cannot be written."""
    import dllm_jepa_full

    def fails(*_: object, **__: object) -> None:
        raise CheckpointError("hf cannot be written: no space left")

    words = ["dllm_jepa_full", *SMALL, f"output_dir={output_dir}", f"export={export}", "max_steps=2"]
    with patch.object(sys, "argv", words), patch.object(dllm_jepa_full, "save_hf", fails):
        with pytest.raises(SystemExit) as exit_info:
            dllm_jepa_full.recipe_main()
    assert exit_info.value.code == 1


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_failed_export_leaves_the_training_state(tmp_path: Path, num_ranks: int) -> None:
    if num_ranks == 1:
        fail_to_export(tmp_path / "run", "both")
    else:
        on_ranks(num_ranks, fail_to_export, tmp_path / "run", "both")
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"
    assert (tmp_path / "run/checkpoints/step_00000002").is_dir() and not (tmp_path / "run/hf").exists()
