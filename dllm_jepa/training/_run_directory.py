"""The output directory of a run: what it holds, who may write into it, and how the run stands.

output_dir/
    config.yaml      the resolved config
    metrics.jsonl    one object for every optimizer step
    status.json      running, stopped, failed or finished; at which step and why
    checkpoints/     training states
    hf/, hf_target/  the exported model, and the one with the target encoder's weights
    adapter/, adapter_target/  of LoRA
    .lock            held while a run uses the directory
"""

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from dllm_jepa.errors import CheckpointError, ConfigError, LaunchError
from dllm_jepa.files import free_name, write_atomically
from dllm_jepa.training._lock import RunLock
from dllm_jepa.training._ranks import Ranks
from dllm_jepa.training._run_files import MetricsFile, StatusFile, is_restart
from dllm_jepa.training._signals import STOPPED_EXIT_CODE, Stopped
from dllm_jepa.training.checkpoint import (
    MANIFEST_NAME,
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
        stretches: whether a schedule stretches to added steps, which resume_override=true then has to allow.

    Raises:
        LaunchError: if the directory holds a run and `resume` does not ask to go on with it, another run uses it, or it
            cannot be written.
        CheckpointError: see `find_start`.
    """

    def __init__(
        self,
        path: str | Path,
        resume: str,
        ranks: Ranks,
        checkpoints: str | Path | None = None,
        *,
        stretches: bool = True,
    ) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.status = StatusFile(self.path / "status.json")
        self.metrics = MetricsFile(self.path / "metrics.jsonl")
        self.checkpoints = self.path / "checkpoints" if checkpoints is None else Path(checkpoints)
        names = {"online": "hf", "target": "hf_target", "adapter": "adapter", "adapter_target": "adapter_target"}
        self.exports = {part: self.path / name for part, name in names.items()}
        self._ranks = ranks
        self._resume = resume
        self._stretches = stretches
        self._is_open = False
        # Checkpoints that stand elsewhere have a lock of their own: another run may be sent there, too.
        elsewhere = [] if checkpoints is None else [self.checkpoints]
        self._locks = [RunLock(folder) for folder in (self.path, *elsewhere)]
        try:
            with ExitStack() as undo:
                undo.callback(self._release)
                self._found, self._resume = ranks.on_rank_zero(self._claim)
                for lock in self._locks:
                    lock.join(ranks.rank)
                self._start = find_start(self._resume, self.checkpoints, ranks)
                ranks.on_rank_zero(self._check_start)
                undo.pop_all()
        except RuntimeError as error:
            if (lost := ranks.lost(error)) is not None:
                raise lost[0] from error
            raise

    @property
    def resume_from(self) -> SavedCheckpoint | None:
        """The checkpoint to go on from, verified; None for a start from step 0."""
        return self._start.checkpoint

    @property
    def start_step(self) -> int:
        """Optimizer steps done before."""
        return 0 if self.resume_from is None else self.resume_from.step

    def is_finished(self, max_steps: int | None, exports: Sequence[str]) -> bool:
        """Whether the run to resume by "auto" has come to its end.

        Args:
            max_steps: steps that it is meant to have; None if they follow from the data.
            exports: the models that it is meant to leave, names of `exports`.

        Raises:
            LaunchError: if steps are to be added to it, which its export stands in the way of.
        """
        done = self._found["step"] if self._found.get("state") == "finished" else None
        if self._resume != "auto" or done is None:
            return False
        if max_steps is not None and done < max_steps:
            self._check_exports(max_steps)
            return False
        if self.missing(exports):
            return False
        if self._ranks.is_rank_zero:
            to_add = self._to_add_steps(_asked_steps(done))
            print(f"{self.path} holds a finished run of {done} steps: nothing to do. {to_add}")
        return True

    def missing(self, exports: Sequence[str]) -> list[str]:
        """Which of the models are not exported yet; the same on every rank."""
        return self._ranks.on_rank_zero(lambda: [part for part in exports if not self.exports[part].exists()])

    def check_steps(self, num_steps: int) -> None:
        """Compare with the steps that the run is meant to have, before anything is written.

        Raises:
            ConfigError: if the checkpoint has more.
            LaunchError: if a step would be done beside an export.
        """
        if self.resume_from is not None and num_steps < self.start_step:
            raise ConfigError(f"{self.resume_from.path} is past the last of {num_steps} steps: raise max_steps")
        if self.start_step < num_steps:
            self._check_exports(num_steps)

    def open(self, config_yaml: str, changes: Sequence[str] = ()) -> None:
        """Take the directory into use, on all ranks at once: from here on it holds this run.

        Damaged checkpoints are moved aside, the config is written, metrics.jsonl is cut back to the step that the run
        goes on from, and `changes` since the checkpoint was saved are printed.
        """
        self._is_open = True
        try:
            self._ranks.on_rank_zero(lambda: self._open(config_yaml, changes))
        except OSError as error:
            raise LaunchError(f"output_dir={self.path} cannot be written: {error}") from None

    def __enter__(self) -> "RunDirectory":
        """Nothing to do: the directory is claimed when it is made."""
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        """Record how the run ended, and let others in."""
        lost = None if error is None else self._ranks.lost(error)
        writes = self._is_open and (self._ranks.is_rank_zero if lost is None else lost[1])
        if writes and lost is not None:
            if self.status.read().get("state") == "running":  # the rank that has ended did not say why itself
                self._record("failed", str(lost[0]))
        elif writes and isinstance(error, Stopped):
            self._record("stopped", error.reason)
            if error.code == STOPPED_EXIT_CODE:
                saved = list_checkpoints(self.checkpoints)[-1]
                print(f"stopped by {error.reason} with {saved} saved: go on by resume=auto", file=sys.stderr)
        elif writes and error is not None:
            self._record("failed", f"{type(error).__name__}: {error}")
        elif writes:
            self._record("finished")
        self._release()
        if lost is not None:
            raise lost[0] from error

    def _claim(self) -> tuple[dict[str, Any], str]:
        """Take the locks and look around; returns status.json and how to resume."""
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
        status = self.status.read()
        if is_restart(status):
            if status["state"] == "stopped":  # a signal that torchrun has not seen; it takes the exit for a failure
                raise Stopped(str(status["reason"]))
            return status, "auto"  # whatever the launch began with, it goes on from there
        held = [path.name for path in (self.metrics.path, *self.exports.values()) if path.exists()]
        saved = list_checkpoints(self.checkpoints)
        held += [self.checkpoints.name] if saved else []
        if self._resume == "never" and held:
            hint = ", or go on with it by resume=auto" if saved else ""
            if status.get("state") == "finished" and saved:
                hint = f". {self._to_add_steps(_asked_steps(status['step']))}"
            raise LaunchError(
                f"output_dir={self.path} already holds a run ({', '.join(held)}); nothing is overwritten: choose "
                f"another output_dir{hint}"
            )
        return status, self._resume

    def _check_exports(self, num_steps: int) -> None:
        """Refuse to do steps up to `num_steps` beside the export of a run that came to its end without them."""
        exported = self._ranks.on_rank_zero(self._exported)
        if exported and self.resume_from is None:
            raise LaunchError(
                f"output_dir={self.path} holds the export of a run that saved no training state, so no steps can be "
                f"added to it: start another run from that model, with checkpoint_dir={exported[0]} and an output_dir "
                "of its own"
            )
        if exported:
            raise LaunchError(
                f"output_dir={self.path} holds the export of a run that came to its end. "
                + self._ranks.on_rank_zero(lambda: self._to_add_steps(num_steps))
            )

    def _exported(self) -> list[Path]:
        return [path for path in self.exports.values() if path.exists()]

    def _to_add_steps(self, num_steps: int) -> str:
        """What to type for a finished run to go on to `num_steps`."""
        moves = [shlex.join(("mv", str(path), str(free_name(path, "_before")))) for path in self._exported()]
        first, override = f"To go on to step {num_steps}, type:", {}
        if self._stretches:
            first = (
                f"To go on to step {num_steps}, with the schedule stretched to it, type (resume_override=true lets "
                "other changed keys pass, too, and lists them):"
            )
            override = {"resume_override": "true"}
        line = command_line(max_steps=num_steps, resume="auto", **override)
        return "\n  ".join([first, *moves, line])

    def _check_start(self) -> None:
        """Refuse to begin anew beside checkpoints that are looked for in another place."""
        known = self._found.get("checkpoint")
        if self._resume == "auto" and self.resume_from is None and known is not None and Path(known).exists():
            raise LaunchError(
                f"output_dir={self.path} has a training state in {known}, and checkpoint.directory leads to "
                f"{self.checkpoints}, where there is none: set it back, or move {self.status.path} away to start again"
            )

    def _open(self, config_yaml: str, changes: Sequence[str]) -> None:
        remove_unfinished(self.checkpoints)
        lines = [f"{reason}; it is kept as {move_aside(path)}" for path, reason in self._start.damaged.items()]
        write_atomically(self.config, config_yaml)
        problem = self.metrics.cut_back(self.start_step)
        for line in (*lines, *([problem] if problem else [])):
            print(f"warning: {line}", file=sys.stderr)
        if self.resume_from is None and self._resume == "auto":
            print(f"starting at step 0: there is no training state in {self.checkpoints}", file=sys.stderr)
        if self.resume_from is not None:
            print(f"going on from {self.resume_from.path}, step {self.start_step}", file=sys.stderr)
            for line in changes:
                print(f"  changed: {line}", file=sys.stderr)
        self._record("running")

    def _record(self, state: str, reason: str | None = None) -> None:
        """Write status.json."""
        complete = list_checkpoints(self.checkpoints)
        step = max(self.metrics.last_step(), self.start_step)
        self.status.write(state, reason, step=step, checkpoint=complete[-1] if complete else None)

    def _release(self) -> None:
        for lock in self._locks:
            lock.release(is_used=self._is_open)


def saved_states(path: Path) -> list[Path]:
    """The training states of a run, oldest first; `path` is its output_dir, their folder, or one of them."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; give the output_dir of a run, or one of its training states")
    if (path / MANIFEST_NAME).exists():
        return [path.resolve()]  # `latest` is a link to the one whose name says its step
    # Those of a run with a checkpoint.directory of its own stand where its status says that the newest one is.
    newest = StatusFile(path / "status.json").read().get("checkpoint")
    folders = [path, path / "checkpoints", *([] if newest is None else [Path(newest).parent])]
    return next((found for folder in folders if (found := list_checkpoints(folder))), [])


def _asked_steps(done: int) -> int:
    """The `max_steps` of the command line, if it adds some; otherwise as many again, so that the line can be typed."""
    words = [word.removeprefix("max_steps=") for word in sys.argv if word.startswith("max_steps=")]
    asked = int(words[-1]) if words and words[-1].isdecimal() else 0
    return asked if asked > done else 2 * done


def command_line(**overrides: object) -> str:
    """The line that has started this run, as it is typed, with some keys set anew."""
    script, num_local = Path(sys.argv[0]), os.environ.get("LOCAL_WORLD_SIZE", "1")
    is_near = script.is_file() and script.absolute().is_relative_to(Path.cwd())
    recipe = os.path.relpath(script) if is_near else script.stem  # of the package's recipes the name is enough
    options = [] if num_local == "1" else ["--nproc_per_node", num_local]
    kept = [word for word in sys.argv[1:] if word.partition("=")[0] not in overrides]
    return shlex.join(["tune", "run", *options, recipe, *kept, *(f"{key}={value}" for key, value in overrides.items())])
