"""What a run reports while it goes on: a bar for the eyes, metrics.jsonl, and a metric logger of one's choice."""

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from dllm_jepa.errors import ConfigError, TrainingError
from dllm_jepa.training._ranks import Ranks
from dllm_jepa.training._run_directory import RunDirectory
from dllm_jepa.training.checkpoint import list_checkpoints

_MAX_NAMED = 64  # sequences in an error message


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


def build_metric_logger(build: Callable[[], MetricLogger] | None, ranks: Ranks) -> MetricLogger | None:
    """The metric logger of the config, on rank zero.

    Raises:
        ConfigError: if it needs a package that is not installed.
    """
    if build is None or not ranks.is_rank_zero:
        return None
    try:
        return build()
    except ImportError as error:
        raise ConfigError(f"metric_logger: {error}; install what it needs, or set metric_logger: null") from error


def build_profiler(build: Callable[[], Any] | None) -> Profiler | None:
    """The profiler of the config; torchtune's `setup_torch_profiler` returns it with its settings."""
    built = None if build is None else build()
    profiler: Profiler | None = built[0] if isinstance(built, tuple) else built
    return profiler


class StepClock:
    """A stop watch whose laps are booked by name.

    On a GPU a lap ends with the work that was handed to it before; it is an event on its stream, which is read later.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._last = self._now()
        self._laps: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Begin the first lap."""
        self._last = self._now()

    def lap(self, name: str) -> None:
        """End a lap; the time since the last one belongs to `name`."""
        self._laps.append((name, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds under every name since the last call; on a GPU it waits for the last lap to end."""
        seconds: dict[str, float] = defaultdict(float)
        for name, end in self._laps:
            if self._on_gpu:
                end.synchronize()
                seconds[name] += self._last.elapsed_time(end) / 1000  # milliseconds
            else:
                seconds[name] += end - self._last
            self._last = end
        self._laps.clear()
        return dict(seconds)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


@dataclass(frozen=True)
class _Step:
    """A step that is not reported yet; `values` are still on the device."""

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
        profiler: profiles the steps, or None.
        ranks: the ranks.
        num_steps: steps of the whole run.
        log_every_n_steps: steps between logging steps.
        peak_tflops: TFLOP/s of one device at its peak, for `mfu`; None leaves it out.
        samples: the dataset indices of a step, for error messages.
        compiles: the first step compiles the model. It is reported by itself, and without a speed.
    """

    def __init__(
        self,
        run: RunDirectory,
        metric_logger: MetricLogger | None,
        profiler: Profiler | None,
        ranks: Ranks,
        *,
        num_steps: int,
        log_every_n_steps: int,
        peak_tflops: float | None,
        samples: Callable[[int], Sequence[int]],
        compiles: bool = False,
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
        self._compiles = compiles
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}
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
        if self._compiles:
            self.say("compiling: the first step takes from half a minute to some minutes longer than those after it")
        if self._profiler is not None:
            self._announce_profile(self._profiler)
            self._profiler.start()
            self._is_profiling = True
        self._clock.start()
        self._last_read = time.perf_counter()
        for step in range(self._start_step, self._num_steps):
            yield step
            self._bar.update()
            if self._profiler is not None:
                self._profiler.step()
            self.lap("other")

    def lap(self, phase: str) -> None:
        """End a phase of the step: the time since the last call is reported as `{phase}_seconds`."""
        self._clock.lap(phase)

    def add(self, name: str, value: Tensor, *, count: Tensor | None = None) -> None:
        """Add what a micro-batch contributes to a metric of the step, on every rank; nothing waits for the device.

        Args:
            name: its key in metrics.jsonl.
            value: scalar on the device; its sum over micro-batches and ranks is the metric. For a mean over the global
                batch it is a sum over the micro-batch, divided by a count of the whole batch.
            count: scalar on the device, for a mean over what the whole batch has an unknown number of: the sum of
                `value` is divided by that of `count`. Nothing is reported where it is zero.
        """
        for sums, part in ((self._sums, value), (self._counts, count)):
            if part is not None:
                sums[name] = sums[name] + part.detach() if name in sums else part.detach()

    def reduce(self) -> dict[str, Tensor]:
        """What was added since the last call, over all ranks, as fp32 scalars on the device; on all ranks at once."""
        sums, counts = self._sums, self._counts
        self._sums, self._counts = {}, {}
        reduced = self._ranks.sum(torch.stack([part.float() for part in (*sums.values(), *counts.values())]))
        values = dict(zip(sums, reduced[: len(sums)], strict=True))
        return values | {name: values[name] / count for name, count in zip(counts, reduced[len(sums) :], strict=True)}

    def write(self, step: int, row: Mapping[str, Any], values: Mapping[str, Tensor], *, flops: float) -> None:
        """Report a step: at once on a logging step, otherwise by the next one.

        Args:
            step: step number from 0; the object in metrics.jsonl counts optimizer steps done, from 1.
            row: its numbers, `tokens` among them.
            values: fp32 scalars on the device, those of `reduce`, `loss` and `grad_norm` among them; one that is NaN
                is left out, but for the last two.
            flops: FLOPs of the step on all ranks together, by the usual count for `mfu`.

        Raises:
            TrainingError: see `flush`.
        """
        numbers = torch.stack([value.detach().float() for value in values.values()])
        self._pending.append(_Step(step, dict(row), tuple(values), numbers, flops))
        is_compiled = self._compiles and step == self._start_step
        if (step + 1) % self._log_every_n_steps == 0 or step + 1 == self._num_steps or is_compiled:
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
            speed = f", {times['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in times else ""
            self._bar.set_postfix_str(f"loss {rows[-1]['loss']:.4f}{speed}", refresh=False)
        return rows

    def sync(self) -> None:
        """`flush`, and wait until all of it is on the disk; before a training state is saved."""
        self.flush()
        self._run.metrics.sync()

    def check(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Read loss and gradient norm of a step before it is written; arguments and errors are those of `write`."""
        numbers = {name: float(values[name]) for name in ("loss", "grad_norm")}
        if not all(map(math.isfinite, numbers.values())):
            self.flush()  # a step before may be the first broken one
            self._check(step, numbers)

    def _check(self, step: int, values: Mapping[str, float]) -> None:
        loss, grad_norm = values["loss"], values["grad_norm"]
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        saved, batch = list_checkpoints(self._run.checkpoints), self._samples(step)
        named = ", ".join(map(str, batch[:_MAX_NAMED])) + (", ..." if len(batch) > _MAX_NAMED else "")
        raise TrainingError(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; stopped, and nothing from this step on is saved."
            f" Dataset indices of its batch: [{named}]. Last good checkpoint: {saved[-1] if saved else 'none'}. Look "
            "at these sequences, or try a lower rate"
        )

    def _times(self, steps: Sequence[_Step]) -> dict[str, float]:
        """Speed and memory since the last logging step; the same for every step since then."""
        now = time.perf_counter()
        seconds, self._last_read = now - self._last_read, now
        has_speed = not (self._compiles and steps[0].number == self._start_step)
        times = {"tokens_per_second": sum(step.row["tokens"] for step in steps) / seconds} if has_speed else {}
        times |= {"step_seconds": seconds / len(steps)}
        times |= {f"{phase}_seconds": lap / len(steps) for phase, lap in self._clock.read().items()}
        if has_speed and self._peak_flops is not None:
            times["mfu"] = sum(step.flops for step in steps) / (seconds * self._peak_flops)
        if self._ranks.device.type == "cuda":
            times["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            times["reserved_memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
        return times

    def _announce_profile(self, profiler: Profiler) -> None:
        """Say that the run ends before a profiler of torch with a schedule is done."""
        if not isinstance(profiler, torch.profiler.profile) or not profiler.record_steps:
            return
        num_steps = self._num_steps - self._start_step
        actions = [profiler.schedule(step) for step in range(num_steps)]
        if torch.profiler.ProfilerAction.RECORD_AND_SAVE not in actions:
            recorded = actions.count(torch.profiler.ProfilerAction.RECORD)
            self.say(
                f"warning: profiler: its schedule is longer than the {num_steps} steps to do, of which it records "
                f"{recorded}: raise max_steps, or lower its wait, warm-up or active steps"
            )

    def say(self, message: str) -> None:
        """Print a line without tearing the bar."""
        if self._ranks.is_rank_zero:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Close the bar, the metric logger and the profiler, which writes what it has."""
        self._bar.close()
        if self._is_profiling and self._profiler is not None:
            self._is_profiling = False
            self._profiler.stop()
        if self._metric_logger is not None:
            self._metric_logger.close()
