"""status.json: how a run stands, for whoever has started it."""

import json
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from dllm_jepa.files import write_atomically


class StatusFile:
    """The file that says whether a run goes on, was stopped, has failed or is finished.

    Args:
        path: the file.
    """

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
    """What tells this launch from others; None without torchrun, or if it was given no name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name
