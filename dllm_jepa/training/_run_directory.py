"""The output directory of a run: what it holds, who may write into it, and the one file that every run writes.

output_dir/
    config.yaml      the resolved config
    metrics.jsonl    one object for every optimizer step
    checkpoints/     training states
    hf/              the exported model
"""

import json
import os
from pathlib import Path
from typing import Any

from dllm_jepa.errors import CheckpointError, LaunchError
from dllm_jepa.training._checkpoint import list_checkpoints, read_scalars


class RunDirectory:
    """Paths of a run, and its claim on them.

    Args:
        path: output_dir.
        resume: "never", "auto" (the newest checkpoint in `path`, or a start from step 0 when there is none) or the path
            of a checkpoint.
        max_steps: steps that the run is meant to have; None if that is not known yet.

    Attributes:
        start_step: optimizer steps done before.
        is_finished: `resume` is "auto", but the run has come to its end and was exported.

    Raises:
        LaunchError: if the directory holds a run and `resume` does not ask to go on with it, or it is a file.
        CheckpointError: if the checkpoint to resume from does not exist or is incomplete.
    """

    def __init__(self, path: str | Path, resume: str, max_steps: int | None = None) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "hf"
        if self.path.exists() and not self.path.is_dir():
            raise LaunchError(f"output_dir={path} is a file; choose another directory")
        self.resume_from = self._find_checkpoint(resume)
        self.start_step = 0 if self.resume_from is None else int(read_scalars(self.resume_from)["step"])
        self._check_writable()
        held = [file.name for file in (self.metrics, self.checkpoints, self.export) if file.exists()]
        self.is_finished = resume == "auto" and self.export.exists()
        if self.is_finished and max_steps is not None and self._last_step() < max_steps:
            raise LaunchError(
                f"output_dir={path} holds the export of {self._last_step()} steps: move {self.export} away to go on to "
                f"max_steps={max_steps}"
            )
        if resume not in ("never", "auto") and self.export.exists():
            raise LaunchError(
                f"output_dir={path} already holds the export of a finished run ({self.export.name}): choose another "
                "output_dir, or move it away"
            )
        later = [saved.name for saved in list_checkpoints(self.checkpoints) if saved.name > self._name_of_start()]
        if resume not in ("never", "auto") and later:
            raise LaunchError(
                f"output_dir={path} holds training states after {resume}: {', '.join(later)}; choose another "
                "output_dir, or move them away"
            )
        if resume == "never" and held:
            raise LaunchError(
                f"output_dir={path} already holds a run ({', '.join(held)}); nothing is overwritten: choose another "
                f"output_dir{', or go on with it by resume=auto' if list_checkpoints(self.checkpoints) else ''}"
            )

    def open(self, config_yaml: str) -> None:
        """Create the directory, write the config, and cut metrics.jsonl back to the step that the run goes on from.

        Raises:
            CheckpointError: if metrics.jsonl ends before that step.
        """
        rows = self._read_metrics()
        # A run that began from another run's checkpoint has its first row at that checkpoint's next step.
        if rows and rows[-1][0] < self.start_step:
            raise CheckpointError(
                f"{self.metrics} ends at step {rows[-1][0]}, before the checkpoint's step {self.start_step}: move it "
                "away to go on without it"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.config.write_text(config_yaml, encoding="utf-8")
        except OSError as error:
            raise LaunchError(f"output_dir={self.path} cannot be written: {error}") from None
        if rows:
            self.metrics.write_text("".join(line for step, line in rows if step <= self.start_step), encoding="utf-8")

    def _read_metrics(self) -> list[tuple[int, str]]:
        """(step, line) of every whole line; the last one may be torn, if the run died while it was written."""
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True) if self.metrics.exists() else []
        return [(json.loads(line)["step"], line) for line in lines if line.endswith("\n")]

    def _last_step(self) -> int:
        return max((step for step, _ in self._read_metrics()), default=0)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Write the object of one optimizer step."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _name_of_start(self) -> str:
        return "" if self.resume_from is None else self.resume_from.name

    def _check_writable(self) -> None:
        parent = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise LaunchError(f"output_dir={self.path} cannot be made: {parent} is not a folder that can be written to")

    def _find_checkpoint(self, resume: str) -> Path | None:
        if resume == "never":
            return None
        if resume == "auto":
            found = list_checkpoints(self.checkpoints)
            return found[-1] if found else None
        if not Path(resume).is_dir():
            raise CheckpointError(f"resume={resume}: there is no such checkpoint directory")
        return Path(resume)
