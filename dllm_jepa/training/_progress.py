"""What a run reports while it goes on: a bar for the eyes, metrics.jsonl, and a metric logger of one's choice."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torchtune.training import DummyProfiler
from tqdm import tqdm

from dllm_jepa.errors import ConfigError
from dllm_jepa.training._guards import check_finite
from dllm_jepa.training._ranks import Ranks
from dllm_jepa.training._run_directory import RunDirectory
from dllm_jepa.training._step_clock import StepClock


class Buildable(Protocol):
    """A component of a config."""

    def build(self, *args: Any, **kwargs: Any) -> Any: ...  # noqa: D102


class MetricLogger(Protocol):
    """The part of torchtune's metric loggers that a run needs."""

    def log_config(self, config: Any) -> None: ...  # noqa: D102

    def log_dict(self, payload: dict[str, Any], step: int) -> None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


class Profiler(Protocol):
    """The part of torch.profiler.profile that a run needs."""

    def start(self) -> None: ...  # noqa: D102

    def step(self) -> None: ...  # noqa: D102

    def stop(self) -> None: ...  # noqa: D102


def build_metric_logger(component: Buildable | None, ranks: Ranks) -> MetricLogger | None:
    """The metric logger that a component describes, on rank zero.

    Raises:
        ConfigError: if it needs a package that is not installed.
    """
    if component is None or not ranks.is_rank_zero:
        return None
    try:
        logger: MetricLogger = component.build()
    except ImportError as error:
        raise ConfigError(f"metric_logger: {error}; install what it needs, or set metric_logger: null") from error
    return logger


def build_profiler(component: Buildable | None) -> Profiler:
    """The profiler that a component describes, as torchtune's `setup_torch_profiler`; for None one that does nothing.

    It is started, told of every step, and stopped however the run ends.
    """
    if component is None:
        nothing: Profiler = DummyProfiler()
        return nothing
    built = component.build()
    profiler: Profiler = built[0] if isinstance(built, tuple) else built  # torchtune's comes with its settings
    return profiler


@dataclass(frozen=True)
class _Step:
    """A step that is not reported yet: its numbers, and those that are still on the device."""

    number: int
    row: dict[str, Any]
    names: tuple[str, ...]
    values: Tensor
    flops: float


class RunLog:
    """Counts the steps and reports each of them: every rank reads and checks its numbers, rank zero writes them down.

    Numbers stay on the device until a logging step, which reads those of all steps since the last one at once; between
    logging steps the host never waits for the device.

    Args:
        run: the output directory, opened.
        metric_logger: a logger beside metrics.jsonl, or None.
        profiler: profiles the steps.
        ranks: the ranks.
        num_steps: steps of the whole run.
        log_every_n_steps: steps between logging steps.
        peak_tflops: TFLOP/s of one device at its peak, for `mfu`; None leaves it out.
        samples: the dataset indices of a step, for error messages.
    """

    def __init__(
        self,
        run: RunDirectory,
        metric_logger: MetricLogger | None,
        profiler: Profiler,
        ranks: Ranks,
        *,
        num_steps: int,
        log_every_n_steps: int,
        peak_tflops: float | None,
        samples: Callable[[int], Sequence[int]],
    ) -> None:
        self._run = run
        self._metric_logger = metric_logger
        self._profiler = profiler
        self._ranks = ranks
        self._start_step = run.start_step
        self._num_steps = num_steps
        self._log_every_n_steps = log_every_n_steps
        self._peak_flops = None if peak_tflops is None else peak_tflops * 1e12 * ranks.world_size
        self._samples = samples
        self._pending: list[_Step] = []
        self._is_profiling = False
        self._clock = StepClock(ranks.device)
        self._last_read = time.perf_counter()
        self._bar = tqdm(
            total=num_steps,
            initial=run.start_step,
            unit="step",
            disable=not ranks.is_rank_zero,
            mininterval=0.2 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
        )

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to do, from 0."""
        self._clock.start()
        self._last_read = time.perf_counter()
        self._profiler.start()
        self._is_profiling = True
        for step in range(self._start_step, self._num_steps):
            yield step
            self._bar.update()
            self._profiler.step()
            self.lap("other")

    def lap(self, phase: str) -> None:
        """End a phase of the step: the time since the last call is reported as `{phase}_seconds`."""
        self._clock.lap(phase)

    def write(self, step: int, row: Mapping[str, Any], values: Mapping[str, Tensor], *, flops: float) -> None:
        """Report a step: at once on a logging step, otherwise by the next one.

        Args:
            step: step number from 0; the object in metrics.jsonl counts optimizer steps done, from 1.
            row: its numbers, `tokens` among them.
            values: fp32 scalars on the device, `loss` and `grad_norm` among them; one that is NaN is left out, but for
                these two.
            flops: FLOPs of the step on all ranks together, by the usual count for `mfu`.

        Raises:
            TrainingError: see `flush`.
        """
        numbers = torch.stack([value.detach().float() for value in values.values()])
        self._pending.append(_Step(step, dict(row), tuple(values), numbers, flops))
        if (step + 1) % self._log_every_n_steps == 0 or step + 1 == self._num_steps:
            rows = self.flush()
            if self._metric_logger is not None and rows:
                self._metric_logger.log_dict(rows[-1], step=step + 1)

    def flush(self) -> list[dict[str, Any]]:
        """Read and write down what is not reported yet, on all ranks; returns it, on rank zero.

        Raises:
            TrainingError: if a loss or a gradient norm is not finite; steps before it are written down.
        """
        steps, self._pending = self._pending, []
        if not steps:
            return []
        values = torch.stack([step.values for step in steps]).tolist()  # the one wait for the device
        times = self._times(steps)
        rows = []
        for step, numbers in zip(steps, values, strict=True):
            named = dict(zip(step.names, numbers, strict=True))
            self._check(step.number, named)
            if self._ranks.is_rank_zero:
                known = {name: number for name, number in named.items() if not math.isnan(number)}
                rows.append({"step": step.number + 1} | known | step.row | times)
                self._run.metrics.append(rows[-1])
        if rows:
            shown = f"loss {rows[-1]['loss']:.4f}, {times['tokens_per_second']:,.0f} tokens/s"
            self._bar.set_postfix_str(shown, refresh=False)
        return rows

    def sync(self) -> None:
        """`flush`, and wait until all of it is on the disk; before a training state is saved.

        Raises:
            TrainingError: see `flush`.
            LaunchError: if it cannot be written.
        """
        self.flush()
        self._run.metrics.sync()

    def check(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Look at a step that is not written yet, before something is made of its numbers that broken ones would break.

        Args:
            step: step number from 0.
            values: as of `write`.

        Raises:
            TrainingError: see `flush`.
        """
        numbers = {name: float(values[name]) for name in ("loss", "grad_norm")}
        if not all(map(math.isfinite, numbers.values())):
            self.flush()  # a step before may be the first broken one
            self._check(step, numbers)

    def _check(self, step: int, values: Mapping[str, float]) -> None:
        guarded = {"loss": values["loss"], "gradient norm": values["grad_norm"]}
        check_finite(step, guarded, samples=self._samples, checkpoints=self._run.checkpoints)

    def _times(self, steps: Sequence[_Step]) -> dict[str, float]:
        """Speed and memory since the last logging step; the same for every step since then."""
        now = time.perf_counter()
        seconds, self._last_read = now - self._last_read, now
        times = {
            "tokens_per_second": sum(step.row["tokens"] for step in steps) / seconds,
            "step_seconds": seconds / len(steps),
        }
        times |= {f"{phase}_seconds": lap / len(steps) for phase, lap in self._clock.read().items()}
        if self._peak_flops is not None:
            times["mfu"] = sum(step.flops for step in steps) / (seconds * self._peak_flops)
        if self._ranks.device.type == "cuda":
            times["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            times["reserved_memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return times

    def say(self, message: str) -> None:
        """Print a line without tearing the bar."""
        if self._ranks.is_rank_zero:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Close the bar, the metric logger and the profiler, which writes what it has."""
        self._bar.close()
        if self._is_profiling:
            self._is_profiling = False
            self._profiler.stop()
        if self._metric_logger is not None:
            self._metric_logger.close()
