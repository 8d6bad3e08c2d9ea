"""The output directory of a run: what it holds, who may write into it, and the one file that every run writes.

output_dir/
    config.yaml      the resolved config
    metrics.jsonl    one object for every optimizer step
    checkpoints/     training states
    hf/              the exported model
"""

import json
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

    Raises:
        LaunchError: if the directory holds a run and `resume` does not ask to go on with it, or it is a file.
        CheckpointError: if the checkpoint to resume from does not exist or is incomplete.
    """

    def __init__(self, path: str | Path, resume: str) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.export = self.path / "hf"
        if self.path.exists() and not self.path.is_dir():
            raise LaunchError(f"output_dir={path} is a file; choose another directory")
        self.resume_from = self._find_checkpoint(resume)
        self.start_step = 0 if self.resume_from is None else int(read_scalars(self.resume_from)["step"])
        held = [file.name for file in (self.metrics, self.checkpoints, self.export) if file.exists()]
        if resume == "never" and held:
            raise LaunchError(
                f"output_dir={path} already holds a run ({', '.join(held)}); nothing is overwritten: choose another "
                "output_dir, or go on with it by resume=auto"
            )

    def open(self, config_yaml: str) -> None:
        """Create the directory, write the config, and cut metrics.jsonl back to the step that the run goes on from.

        Raises:
            CheckpointError: if metrics.jsonl ends before that step.
        """
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True) if self.metrics.exists() else []
        # The last line may be torn: the run died while it was written.
        rows = [(json.loads(line)["step"], line) for line in lines if line.endswith("\n")]
        # A run that began from another run's checkpoint has its first row at that checkpoint's next step.
        if rows and rows[-1][0] < self.start_step:
            raise CheckpointError(
                f"{self.metrics} ends at step {rows[-1][0]}, before the checkpoint's step {self.start_step}: move it "
                "away to go on without it"
            )
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.config.write_text(config_yaml, encoding="utf-8")
        self.metrics.write_text("".join(line for step, line in rows if step <= self.start_step), encoding="utf-8")

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Write the object of one optimizer step."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def _find_checkpoint(self, resume: str) -> Path | None:
        if resume == "never":
            return None
        if resume == "auto":
            found = list_checkpoints(self.checkpoints)
            return found[-1] if found else None
        if not Path(resume).is_dir():
            raise CheckpointError(f"resume={resume}: there is no such checkpoint directory")
        return Path(resume)
