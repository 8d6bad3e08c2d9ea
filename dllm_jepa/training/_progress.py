"""What a run reports while it goes on: a bar for the eyes, metrics.jsonl, and a metric logger of one's choice."""

import sys
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from tqdm import tqdm

from dllm_jepa.training._ranks import Ranks
from dllm_jepa.training._run_directory import RunDirectory


class MetricLogger(Protocol):
    """The part of torchtune's metric loggers that a run needs."""

    def log_config(self, config: Any) -> None: ...  # noqa: D102

    def log_dict(self, payload: dict[str, Any], step: int) -> None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


class RunLog:
    """Counts the steps and reports each of them; on rank zero only.

    Args:
        run: the output directory, opened.
        metric_logger: a logger beside metrics.jsonl, or None.
        ranks: the ranks.
        num_steps: steps of the whole run.
        log_every_n_steps: steps between reports to the metric logger.
    """

    def __init__(
        self,
        run: RunDirectory,
        metric_logger: MetricLogger | None,
        ranks: Ranks,
        *,
        num_steps: int,
        log_every_n_steps: int,
    ) -> None:
        self._run = run
        self._metric_logger = metric_logger
        self._ranks = ranks
        self._start_step = run.start_step
        self._num_steps = num_steps
        self._log_every_n_steps = log_every_n_steps
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
        self._last = time.perf_counter()
        for step in range(self._start_step, self._num_steps):
            yield step
            self._bar.update()

    def write(self, step: int, row: dict[str, Any]) -> None:
        """Report a step.

        Args:
            step: step number from 0; the object in metrics.jsonl counts optimizer steps done, from 1.
            row: its numbers, `tokens` and `loss` among them.
        """
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if not self._ranks.is_rank_zero:
            return
        tokens_per_second = row["tokens"] / seconds
        row = {"step": step + 1} | row | {"tokens_per_second": tokens_per_second, "step_seconds": seconds}
        if self._ranks.device.type == "cuda":
            row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self._run.metrics.append(row)
        if self._metric_logger is not None and (step + 1) % self._log_every_n_steps == 0:
            self._metric_logger.log_dict(row, step=step + 1)
        self._bar.set_postfix_str(f"loss {row['loss']:.4f}, {tokens_per_second:,.0f} tokens/s", refresh=False)

    def say(self, message: str) -> None:
        """Print a line without tearing the bar."""
        if self._ranks.is_rank_zero:
            self._bar.write(message, file=sys.stderr)

    def close(self) -> None:
        """Close the bar and the metric logger."""
        self._bar.close()
        if self._metric_logger is not None:
            self._metric_logger.close()
