"""The report of a run: when the device is waited for, what is written, and what it says of time."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dllm_jepa.errors import ConfigError, TrainingError
from dllm_jepa.training import Ranks, RunDirectory, RunLog, build_metric_logger, build_profiler
from dllm_jepa.training._run_log import StepClock

BOTH = {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(2.0)}


class Clock:
    """Time that goes on only when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def after(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Logger:
    """A metric logger that keeps what it gets."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.losses: list[float] = []

    def log_config(self, config: Any) -> None: ...

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        self.steps.append(step)
        self.losses.append(payload["loss"])

    def close(self) -> None: ...


class Steps:
    """What a profiler was told."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self) -> None:
        self.calls.append("start")

    def step(self) -> None:
        self.calls.append("step")

    def stop(self) -> None:
        self.calls.append("stop")


class Run:
    """A log in a directory of its own."""

    def __init__(
        self,
        path: Path,
        *,
        rank: int = 0,
        num_steps: int = 7,
        every: int = 3,
        peak: float | None = None,
        profiler: Any = None,
        compiles: bool = False,
    ) -> None:
        self.path = path / "metrics.jsonl"
        self.logger, self.profiler = Logger(), profiler or Steps()
        ranks = Ranks(rank, 1, torch.device("cpu"))
        self.log = RunLog(
            RunDirectory(path, "never", Ranks(0, 1, torch.device("cpu"))),
            self.logger if rank == 0 else None,
            self.profiler,
            ranks,
            num_steps=num_steps,
            log_every_n_steps=every,
            peak_tflops=peak,
            samples=lambda step: [10 * step, 10 * step + 1],
            compiles=compiles,
        )

    def write(self, step: int, **values: float) -> None:
        named = {"loss": 1.0 + step, "grad_norm": 2.0, **values}
        tensors = {name: torch.tensor(value) for name, value in named.items()}
        self.log.write(step, {"tokens": 10 * (step + 1), "lr": 0.5}, tensors, flops=1e12)

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


def test_steps_are_written_together_on_logging_steps_and_at_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path)
    written = []
    for step in range(7):
        run.write(step)
        written.append(len(run.rows()))
    assert written == [0, 0, 3, 3, 3, 6, 7]
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4, 5, 6, 7]
    assert [row["loss"] for row in run.rows()] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert run.logger.steps == [3, 6, 7] and run.logger.losses == [3.0, 6.0, 7.0]


def test_flushing_writes_what_is_pending_once(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write(0)
    run.write(1)
    assert [row["step"] for row in run.log.flush()] == [1, 2]
    assert run.log.flush() == []
    run.write(2)
    assert [row["step"] for row in run.rows()] == [1, 2, 3]


def test_the_device_is_read_once_for_all_pending_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, ...]] = []
    to_list = Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        reads.append(tuple(tensor.shape))
        return to_list(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    for name in ("item", "__float__", "__bool__", "__int__"):
        monkeypatch.setattr(Tensor, name, lambda _: pytest.fail("a wait for the device"))
    run = Run(tmp_path)
    for step in range(3):
        assert reads == []
        run.log.add("extra", torch.tensor(3.0), count=torch.tensor(2))
        run.log.write(step, {"tokens": 1}, run.log.reduce() | BOTH, flops=1.0)
    assert reads == [(3, 3)]


def test_metrics_are_summed_over_micro_batches_and_steps_start_anew(tmp_path: Path) -> None:
    """Those with a count are means, and nothing where there is nothing to count; gradients are let go."""
    run = Run(tmp_path, every=1)
    for step, parts in enumerate([[1.0, 2.0], [4.0]]):
        for part in parts:
            run.log.add("sum", torch.tensor(part, requires_grad=True))
            run.log.add("mean", torch.tensor(part), count=torch.tensor(2))
            run.log.add("none", torch.tensor(0.0), count=torch.tensor(0))
        values = run.log.reduce()
        assert not any(value.requires_grad for value in values.values())
        run.log.write(step, {"tokens": 1}, values | BOTH, flops=1.0)
    assert [(row["sum"], row["mean"], "none" in row) for row in run.rows()] == [(3.0, 0.75, False), (4.0, 2.0, False)]
    assert list(run.rows()[0])[:3] == ["step", "sum", "mean"]


def test_a_value_without_a_number_is_left_out(tmp_path: Path) -> None:
    run = Run(tmp_path, every=1)
    run.write(0, band=math.nan)
    run.write(1, band=0.25)
    assert ["band" in row for row in run.rows()] == [False, True]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("broken", "said"), [({"loss": math.nan}, "loss nan"), ({"grad_norm": math.inf}, "gradient norm inf")]
)
def test_a_broken_step_is_named_though_it_is_found_later(
    tmp_path: Path, rank: int, broken: dict[str, float], said: str
) -> None:
    """On every rank, or the others would wait for this one."""
    run = Run(tmp_path, rank=rank)
    run.write(0)
    run.write(1, **broken)
    with pytest.raises(TrainingError, match=rf"step 2: .*{said}") as error:
        run.write(2)
    assert "[10, 11]" in str(error.value)
    assert [row["step"] for row in run.rows()] == ([1] if rank == 0 else [])


def test_a_step_can_be_looked_at_before_it_is_written(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write(0)
    run.log.check(1, {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(2.0)})
    assert run.rows() == []
    with pytest.raises(TrainingError, match="step 2: loss nan"):
        run.log.check(1, {"loss": torch.tensor(math.nan), "grad_norm": torch.tensor(2.0)})
    assert [row["step"] for row in run.rows()] == [1]
    run.write(1, grad_norm=math.inf)
    with pytest.raises(TrainingError, match="step 2: .*gradient norm inf"):
        run.log.check(2, {"loss": torch.tensor(math.nan), "grad_norm": torch.tensor(2.0)})


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    run = Run(tmp_path, rank=1, every=1)
    run.write(0)
    assert run.rows() == []


def test_times_are_means_since_the_last_report(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path, num_steps=4, every=2, peak=2.0)
    for step in run.log.steps():
        clock.after(1.0)
        run.log.lap("data")
        for _ in range(2):
            clock.after(2.0)
            run.log.lap("forward")
            clock.after(0.5)
            run.log.lap("backward")
        run.log.check(step, {"loss": torch.tensor(1.0), "grad_norm": torch.tensor(2.0)})  # changes no time
        run.write(step)
        clock.after(4.0)  # saving, which belongs to the next report
    first, _, third, _ = run.rows()
    assert first["data_seconds"] == 1.0 and first["forward_seconds"] == 4.0 and first["backward_seconds"] == 1.0
    assert first["other_seconds"] == 2.0 and third["other_seconds"] == 4.0
    assert first["step_seconds"] == 8.0 and third["step_seconds"] == 10.0
    assert first["tokens_per_second"] == (10 + 20) / 16
    assert first["mfu"] == pytest.approx(2e12 / (16 * 2e12))
    phases = ("data", "forward", "backward", "other")
    assert sum(third[f"{phase}_seconds"] for phase in phases) == pytest.approx(third["step_seconds"])


def test_without_a_peak_no_mfu(tmp_path: Path) -> None:
    run = Run(tmp_path, every=1)
    run.write(0)
    assert "mfu" not in run.rows()[0]


def test_a_first_step_that_compiles_is_announced_and_kept_out_of_the_speed(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run(tmp_path, num_steps=3, every=3, peak=1.0, compiles=True)
    for step in run.log.steps():
        if step == 0:
            assert "compiling: the first step takes" in capsys.readouterr().err
        clock.after(50.0 if step == 0 else 1.0)
        run.log.lap("forward")
        run.write(step)
        assert len(run.rows()) == (1 if step < 2 else 3)
    first, _, third = run.rows()
    assert first["step_seconds"] == first["forward_seconds"] == 50.0
    assert "tokens_per_second" not in first and "mfu" not in first
    assert third["step_seconds"] == 1.0 and third["tokens_per_second"] == (20 + 30) / 2


def test_the_profiler_is_told_of_every_step(tmp_path: Path) -> None:
    run = Run(tmp_path, num_steps=2)
    for _ in run.log.steps():
        pass
    run.log.close()
    assert run.profiler.calls == ["start", "step", "step", "stop"]


def test_the_profiler_is_stopped_once_however_the_run_ends(tmp_path: Path) -> None:
    run = Run(tmp_path, num_steps=3)
    with pytest.raises(ZeroDivisionError):
        for step in run.log.steps():
            1 // (1 - step)
    run.log.close()
    run.log.close()
    assert run.profiler.calls == ["start", "step", "stop"]
    never_begun = Run(tmp_path)
    never_begun.log.close()
    assert never_begun.profiler.calls == []


def test_a_profiler_may_come_with_its_settings() -> None:
    profiler = Steps()
    assert build_profiler(None) is None
    assert build_profiler(lambda: profiler) is build_profiler(lambda: (profiler, {})) is profiler


@pytest.mark.parametrize(("num_steps", "recorded"), [(4, None), (3, "1"), (2, "0")])
def test_a_profiler_that_is_not_done_by_the_end_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], num_steps: int, recorded: str | None
) -> None:
    """Of two steps that are to be recorded after two others."""
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=2, repeat=1)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], schedule=schedule)
    run = Run(tmp_path, num_steps=num_steps, profiler=profiler)
    for _ in run.log.steps():
        torch.ones(3).sum()
    run.log.close()
    said = capsys.readouterr().err
    assert ("profiler: its schedule is longer" in said) == (recorded is not None)
    assert recorded is None or f"the {num_steps} steps to do, of which it records {recorded}:" in said


def test_metric_loggers_are_built_on_rank_zero(tmp_path: Path) -> None:
    first, second = (Ranks(rank, 2, torch.device("cpu")) for rank in (0, 1))
    assert isinstance(build_metric_logger(Logger, first), Logger)
    assert build_metric_logger(Logger, second) is None
    assert build_metric_logger(None, first) is None


def needs_a_package() -> Logger:
    raise ImportError("no module named board")


def test_a_metric_logger_that_lacks_its_package() -> None:
    with pytest.raises(ConfigError, match="metric_logger: no module named board; install"):
        build_metric_logger(needs_a_package, Ranks(0, 1, torch.device("cpu")))


def test_laps_are_booked_by_name_and_read_once(clock: Clock) -> None:
    watch = StepClock(torch.device("cpu"))
    clock.after(16.0)
    watch.start()
    for name, seconds in (("a", 1.0), ("b", 2.0), ("a", 4.0)):
        clock.after(seconds)
        watch.lap(name)
    assert watch.read() == {"a": 5.0, "b": 2.0}
    clock.after(8.0)
    assert watch.read() == {}
    watch.lap("b")
    assert watch.read() == {"b": 8.0}


@pytest.mark.gpu
def test_laps_on_a_gpu_are_the_times_of_its_work() -> None:
    device = torch.device("cuda")
    watch, matrix = StepClock(device), torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    watch.read()
    for _ in range(20):
        matrix = torch.nn.functional.normalize(matrix @ matrix)
    watch.lap("long")
    watch.lap("nothing")
    seconds = watch.read()
    assert seconds["long"] > 20 * seconds["nothing"] >= 0
