"""The output directory of a run: what it holds, who may write into it, and how the run stands.

output_dir/
    config.yaml      the resolved config
    metrics.jsonl    one object for every optimizer step
    status.json      running, stopped, failed or finished; at which step and why
    checkpoints/     training states
    hf/, hf_target/  the exported model, and the one with the target encoder's weights
    .lock            held while a run uses the directory
"""

import json
import os
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from dllm_jepa.errors import ConfigError, LaunchError
from dllm_jepa.files import write_atomically
from dllm_jepa.training._lock import RunLock
from dllm_jepa.training._metrics_file import MetricsFile
from dllm_jepa.training._ranks import Ranks
from dllm_jepa.training._signals import Stopped
from dllm_jepa.training.checkpoint import (
    SavedCheckpoint,
    find_start,
    list_checkpoints,
    move_aside,
    remove_unfinished,
)


class RunDirectory:
    """Paths of a run, and its claim on them. Made on all ranks at once; as a context manager it records how it ends.

    Args:
        path: output_dir.
        resume: "never", "auto" (the newest intact checkpoint, or step 0 if there are none) or the path of one.
        ranks: the ranks.
        checkpoints: where the training states stand; None for `path`/checkpoints.

    Raises:
        LaunchError: if the directory holds a run and `resume` does not ask to go on with it, another run uses it, or it
            cannot be written.
        CheckpointError: see `find_start`.
    """

    def __init__(self, path: str | Path, resume: str, ranks: Ranks, checkpoints: str | Path | None = None) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.status = self.path / "status.json"
        self.metrics = MetricsFile(self.path / "metrics.jsonl")
        self.checkpoints = self.path / "checkpoints" if checkpoints is None else Path(checkpoints)
        self.exports = {"online": self.path / "hf", "target": self.path / "hf_target"}
        self._ranks = ranks
        self._resume = resume
        self._is_open = False
        # Checkpoints that stand elsewhere have a lock of their own: another run may be sent there, too.
        elsewhere = [] if checkpoints is None else [self.checkpoints]
        self._locks = [RunLock(folder) for folder in (self.path, *elsewhere)]
        try:
            ranks.on_rank_zero(self._claim)
            for lock in self._locks:
                lock.join(ranks.rank)
            self._start = find_start(resume, self.checkpoints, ranks)
            self._finished_steps: int | None = ranks.on_rank_zero(self._read_finished_steps)
        except BaseException:
            self._release()
            raise

    @property
    def resume_from(self) -> SavedCheckpoint | None:
        """The checkpoint to go on from, verified; None for a start from step 0."""
        return self._start.checkpoint

    @property
    def start_step(self) -> int:
        """Optimizer steps done before."""
        return 0 if self.resume_from is None else self.resume_from.step

    def is_finished(self, max_steps: int | None) -> bool:
        """Whether the run to resume by "auto" has come to its end.

        Args:
            max_steps: steps that it is meant to have; None if they follow from the data.
        """
        done = self._finished_steps
        if self._resume != "auto" or done is None or (max_steps is not None and done < max_steps):
            return False
        if self._ranks.is_rank_zero:
            print(f"{self.path} holds a finished run of {done} steps: nothing to do. To add steps, set max_steps")
        return True

    def check_steps(self, num_steps: int) -> None:
        """Compare with the steps that the run is meant to have, before anything is written.

        Raises:
            ConfigError: if there are more in the checkpoint.
            LaunchError: if a step would be done although the result is there.
        """
        if self.resume_from is not None and num_steps < self.start_step:
            raise ConfigError(f"{self.resume_from.path} is past the last of {num_steps} steps: raise max_steps")
        exported = [str(path) for path in self.exports.values() if path.exists()]
        if exported and self.start_step < num_steps:
            raise LaunchError(
                f"output_dir={self.path} holds the export of a run that came to its end: move {' and '.join(exported)} "
                f"away to go on from step {self.start_step} to step {num_steps}"
            )

    def open(self, config_yaml: str, changes: Sequence[str] = ()) -> None:
        """Take the directory into use, on all ranks at once: from here on it holds this run.

        Damaged checkpoints are moved aside, the config is written, and metrics.jsonl is cut back to the step that the
        run goes on from.

        Args:
            config_yaml: the resolved config.
            changes: what is not as it was when the checkpoint was saved, to be said.

        Raises:
            LaunchError: if it cannot be written.
        """
        self._is_open = True
        try:
            self._ranks.on_rank_zero(lambda: self._open(config_yaml, changes))
        except OSError as error:
            raise LaunchError(f"output_dir={self.path} cannot be written: {error}") from None

    def record(self, state: str, reason: str | None = None) -> None:
        """Write status.json, on rank zero."""
        if not self._ranks.is_rank_zero:
            return
        complete = list_checkpoints(self.checkpoints)
        status = {
            "state": state,
            "reason": reason,
            "step": int(self.metrics.last_row.get("step", self.start_step)),
            "checkpoint": str(complete[-1]) if complete else None,
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        }
        try:
            write_atomically(self.status, json.dumps(status, indent=1) + "\n")
        except OSError as error:  # a full disk must not hide what it has led to
            print(f"warning: {self.status} cannot be written: {error}", file=sys.stderr)

    def __enter__(self) -> "RunDirectory":
        """Nothing to do: the directory is claimed when it is made."""
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        """Record how the run ended, and let others in.

        Raises:
            LaunchError: in place of an error that comes from another rank having ended.
        """
        lost = None if error is None else self._ranks.lost(error)
        if self._is_open and isinstance(error, Stopped):
            self.record("stopped", error.reason)
            if self._ranks.is_rank_zero:
                saved = list_checkpoints(self.checkpoints)[-1]
                print(f"stopped by {error.reason} with {saved} saved: go on by resume=auto", file=sys.stderr)
        elif self._is_open and error is not None:
            self.record("failed", f"{type(error).__name__}: {error}" if lost is None else str(lost))
        elif self._is_open:
            self.record("finished")
        self._release()
        if lost is not None:
            raise lost from error

    def _claim(self) -> None:
        for folder in (self.path, self.checkpoints):
            if folder.exists() and not folder.is_dir():
                raise LaunchError(f"output_dir={folder} is a file; choose another directory")
            existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
            if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
                raise LaunchError(
                    f"output_dir={folder} cannot be made: {existing} is not a folder that can be written to"
                )
        for lock in self._locks:
            lock.acquire()
        held = [path.name for path in (self.metrics.path, *self.exports.values()) if path.exists()]
        saved = list_checkpoints(self.checkpoints)
        held += [self.checkpoints.name] if saved else []
        if self._resume == "never" and held:
            hint = ", or go on with it by resume=auto" if saved else ""
            raise LaunchError(
                f"output_dir={self.path} already holds a run ({', '.join(held)}); nothing is overwritten: choose "
                f"another output_dir{hint}"
            )

    def _read_finished_steps(self) -> int | None:
        try:
            status: Any = json.loads(self.status.read_text(encoding="utf-8"))
            return int(status["step"]) if status["state"] == "finished" else None
        except FileNotFoundError:
            return None
        except (OSError, KeyError, TypeError, ValueError) as error:  # ValueError: also what is no JSON, or no UTF-8
            print(f"warning: {self.status} is damaged ({error!r}) and not relied on", file=sys.stderr)
            return None

    def _open(self, config_yaml: str, changes: Sequence[str]) -> None:
        remove_unfinished(self.checkpoints)
        lines = [f"{reason}; it is kept as {move_aside(path)}" for path, reason in self._start.damaged.items()]
        write_atomically(self.config, config_yaml)
        problem = self.metrics.cut_back(self.start_step)
        for line in (*lines, *([problem] if problem else [])):
            print(f"warning: {line}", file=sys.stderr)
        if self.resume_from is not None:
            print(f"going on from {self.resume_from.path}, step {self.start_step}", file=sys.stderr)
            for line in changes:
                print(f"  changed: {line}", file=sys.stderr)
        self.record("running")

    def _release(self) -> None:
        for lock in self._locks:
            lock.release(is_used=self._is_open)
