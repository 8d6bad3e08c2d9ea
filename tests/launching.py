"""Run recipes as a user does, small: in this process, or on several gloo ranks."""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessException

from dllm_jepa.training import SavedCheckpoint

ROOT = Path(__file__).parents[1]

# The demo's config, small enough for seconds: a batch of 12 short sequences, several micro-batches a step.
SMALL = [
    "--config",
    "tiny",
    "model.embed_dim=32",
    "model.num_layers=2",
    "model.mlp_dim=48",
    "dataset.num_pairs=60",
    "tokens_per_device=4000",
    "global_batch_size=12",
    "max_steps=6",
    "monitor_every=2",
    "lr_scheduler.num_warmup_steps=3",
    "optimizer.lr=1e-3",
    "export=null",
]

# The same for adapters: of rank 4, so that they are smaller than any weight of the base.
SMALL_LORA = ["--config", "tiny_lora", *SMALL[2:], "model.lora_rank=4", "model.lora_alpha=8.0"]


def run_here(
    output_dir: Path, *overrides: str, recipe: str = "dllm_jepa_full", base: list[str] = SMALL
) -> list[dict[str, Any]]:
    """Run a recipe in this process; returns the objects of its metrics.jsonl."""
    with patch.object(sys, "argv", [recipe, *base, f"output_dir={output_dir}", *overrides]):
        importlib.import_module(recipe).recipe_main()
    return metrics(output_dir)


# An evaluation on held-out pairs, small enough for seconds.
SMALL_EVAL = [
    "--config",
    "tiny_eval",
    "task.num_pairs=6",
    "decoding.gen_length=8",
    "decoding.block_length=8",
    "decoding.steps=8",
    "batch_size=4",
]


def eval_here(output_dir: Path, *overrides: str) -> dict[str, Any]:
    """Evaluate in this process; returns what scores.json holds."""
    with patch.object(sys, "argv", ["dllm_jepa_eval", *SMALL_EVAL, f"output_dir={output_dir}", *overrides]):
        importlib.import_module("dllm_jepa_eval").recipe_main()
    return json.loads((output_dir / "scores.json").read_text())


# Recipes, and what they would import as soon as they train: every rank for itself, for longer than most runs take.
PRELOADED = ["dllm_jepa_full", "dllm_jepa_lora", "dllm_jepa_eval", "tests.launching", "dllm_jepa.models.tiny"]
PRELOADED += ["dllm_jepa.training._sharding", "dllm_jepa.training.checkpoint._dcp", "omegaconf", "torch._dynamo"]
PRELOADED += ["torchao.optim", "torchao.dtypes.nf4tensor"]


def run_on_ranks(
    num_ranks: int, runs: dict[Path, list[str]], *, recipe: str = "dllm_jepa_full", base: list[str] = SMALL
) -> None:
    """Run a recipe several times, one after the other, on the same gloo ranks."""
    arguments = [[recipe, *base, f"output_dir={output_dir}", *overrides] for output_dir, overrides in runs.items()]
    on_ranks(num_ranks, _run_all, arguments, free_ports(len(runs)))


def _run_all(runs: list[list[str]], ports: list[int]) -> None:
    for arguments, port in zip(runs, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)  # a store of its own for every run
        with patch.object(sys, "argv", arguments):
            importlib.import_module(arguments[0]).recipe_main()


def on_ranks(num_ranks: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call a function in several processes, with the variables by which ranks find each other.

    They are forked from a server that has imported the recipes, once for all tests of a worker: imports take longer
    than most of these runs. torchrun is not there, nor its own variables (TORCHELASTIC_...): what depends on it is for
    tests that launch it. What the ranks print is shown when one fails, and none of them is left behind.

    Raises:
        AssertionError: a rank failed or took too long.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{rank}.txt") for rank in range(num_ranks)]
        (port,) = free_ports(1)
        context = torch.multiprocessing.start_processes(
            _rank,
            (num_ranks, port, logs, dict(os.environ), function, arguments),
            num_ranks,
            join=False,
            start_method="forkserver",
        )
        deadline = time.monotonic() + 300
        try:
            while not context.join(timeout=1, grace_period=2):
                if time.monotonic() > deadline:
                    raise AssertionError("\n".join(["not done after 300 s", *(log.read_text() for log in logs)]))
        except ProcessException as failure:
            raise AssertionError("\n".join([str(failure), *(log.read_text() for log in logs)])) from None
        finally:
            for process in context.processes:
                process.kill()
                process.join()


def _rank(
    rank: int,
    num_ranks: int,
    port: int,
    logs: list[Path],
    environment: dict[str, str],
    function: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    for output in (sys.stdout, sys.stderr):
        with logs[rank].open("a") as log:
            os.dup2(log.fileno(), output.fileno())
        output.reconfigure(line_buffering=True)  # of a rank that is killed, too
    os.environ.clear()  # it was the server's, of an earlier test
    os.environ |= environment
    sizes = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in sizes.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        torch.compiler.set_stance("force_eager")  # the variable itself is read at the import, which was long ago
    try:
        function(*arguments)
    except KeyboardInterrupt:
        raise SystemExit(1) from None  # torch takes it for the end of a rank that did its work


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives to connections: they stay free until used."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(10_000, 30_000), 1000):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("localhost", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"not {count} free ports among a thousand")


def metrics(output_dir: Path) -> list[dict[str, Any]]:
    """The objects of a run's metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


class SignalAtStep:
    """A metric logger that sends its own process a signal after a step."""

    def __init__(self, at_step: int, name: str) -> None:
        self._at_step = at_step
        self._signal = signal.Signals[name]

    def log_config(self, config: Any) -> None: ...

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        if step == self._at_step:
            os.kill(os.getpid(), self._signal)

    def close(self) -> None: ...


class FailAtStep(SignalAtStep):
    """A metric logger that breaks after a step."""

    def __init__(self, at_step: int) -> None:
        super().__init__(at_step, "SIGTERM")

    def log_dict(self, payload: dict[str, Any], step: int) -> None:
        if step == self._at_step:
            raise ZeroDivisionError


def status(output_dir: Path) -> dict[str, Any]:
    """A run's status.json."""
    return json.loads((output_dir / "status.json").read_text())


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what differs between two runs of the same."""
    return [{key: row[key] for key in row if not key.endswith(("_per_second", "_seconds"))} for row in rows]


def training_state(run: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, read in one process whatever wrote it."""
    saved = SavedCheckpoint(run / "checkpoints" / f"step_{step:08d}")
    return {name: saved.read(name, entry.properties.dtype) for name, entry in saved.tensors.items()}


def assert_same_state(run: Path, reference: Path, step: int) -> None:
    """Bit for bit."""
    state, expected = training_state(run, step), training_state(reference, step)
    assert state.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(state[name], expected[name])] == []


def copy_up_to(run: Path, copy: Path, step: int) -> None:
    """What a run would have left if it had died after a checkpoint."""
    shutil.copytree(run, copy, symlinks=True)
    (copy / "status.json").unlink()
    for later in (copy / "checkpoints").glob("step_*"):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)
