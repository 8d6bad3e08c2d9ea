"""The two files by which a run tells how it goes, written by rank zero.

metrics.jsonl    one JSON object for every optimizer step, each step once, over any number of restarts
status.json      how the run stands, for whoever has started it
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from dllm_jepa.errors import LaunchError
from dllm_jepa.files import free_name, write_atomically


class MetricsFile:
    """metrics.jsonl, which the first row makes, and the last row written to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_row: dict[str, Any] = {}

    def append(self, row: dict[str, Any]) -> None:
        """Write the object of one optimizer step."""
        with self._to_append() as file:
            file.write(json.dumps(row) + "\n")
        self.last_row = row

    def last_step(self) -> int:
        """The last step that was reported, by whichever rank; 0 if none was."""
        if self.last_row or not self.path.exists():
            return int(self.last_row.get("step", 0))
        lines = self.path.read_bytes().decode("utf-8", errors="replace").splitlines(keepends=True)
        return max((_step_of(line) or 0 for line in lines), default=0)

    def sync(self) -> None:
        """Wait until every row that was written is on the disk, so that no checkpoint is ever ahead of them."""
        if self.last_row:
            with self._to_append() as file:
                os.fsync(file.fileno())

    @contextmanager
    def _to_append(self) -> Iterator[TextIO]:
        try:
            with self.path.open("a", encoding="utf-8") as file:
                yield file
        except OSError as error:
            raise LaunchError(f"{self.path} cannot be written: {error}") from None

    def cut_back(self, last_step: int) -> str | None:
        """Remove the rows after `last_step`, of the steps that will be done again.

        Returns:
            What is wrong with the rows up to there: then the file is kept under another name, and every row that can
            be read stays. None if they are in order, as after any crash of the run.
        """
        if not self.path.exists():
            return None
        # A run that died while it wrote leaves a last line without an end.
        lines = self.path.read_bytes().decode("utf-8", errors="replace").splitlines(keepends=True)
        rows: dict[int, str] = {}
        unreadable = []
        for number, line in enumerate(lines, 1):
            step = _step_of(line)
            if step is None and line.endswith("\n"):
                unreadable.append(number)
            elif step is not None and step <= last_step:
                rows[step] = line
        self.last_row = json.loads(rows[max(rows)]) if rows else {}
        missing = sorted(set(range(min(rows, default=last_step), last_step + 1)) - rows.keys() - {0})
        problem = None
        if unreadable or missing:
            kept = free_name(self.path, ".damaged")
            kept.write_bytes(self.path.read_bytes())
            what = [f"line {number} cannot be read" for number in unreadable[:3]]
            if missing:
                what.append(f"no row of step {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else ""))
            problem = f"{self.path} is damaged ({'; '.join(what)}): it is kept as {kept.name}"
        write_atomically(self.path, "".join(rows[step] for step in sorted(rows)))
        return problem


def _step_of(line: str) -> int | None:
    """The step of a whole row; None if it is not one."""
    try:
        step = json.loads(line)["step"] if line.endswith("\n") else None
    except (json.JSONDecodeError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


class StatusFile:
    """status.json, which says whether a run goes on, was stopped, has failed or is finished."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, state: str, reason: str | None, *, step: int, checkpoint: Path | None) -> None:
        """Replace it; that it cannot be written is said, and hides nothing that has led to it.

        Args:
            state: "running", "stopped", "failed" or "finished".
            reason: the signal or the error.
            step: optimizer steps done.
            checkpoint: the newest complete checkpoint.
        """
        status = {
            "state": state,
            "reason": reason,
            "step": step,
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "time": datetime.now().astimezone().isoformat(timespec="seconds"),
            "launch": _launch(),
        }
        try:
            write_atomically(self.path, json.dumps(status, indent=1) + "\n")
        except OSError as error:
            print(f"warning: {self.path} cannot be written: {error}", file=sys.stderr)

    def read(self) -> dict[str, Any]:
        """What it says; nothing if it is not there, or damaged, which is said."""
        try:
            status: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            return status | {"state": str(status["state"]), "step": int(status["step"])}
        except FileNotFoundError:
            return {}
        except (OSError, KeyError, TypeError, ValueError) as error:  # ValueError: also what is no JSON, or no UTF-8
            print(f"warning: {self.path} is damaged ({error!r}) and not relied on", file=sys.stderr)
            return {}


def is_restart(status: dict[str, Any]) -> bool:
    """Whether torchrun has started these ranks again, after others of the same launch that left this status."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return restarted and _launch() is not None and status.get("launch") == _launch()


def _launch() -> str | None:
    """The name that torchrun has given to this launch; None without it."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name
