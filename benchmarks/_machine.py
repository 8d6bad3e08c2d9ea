"""What the scripts here share: a line on the machine, and measurements of this process and of others."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dllm_jepa import __version__


def describe_machine(device: str = "cpu", *extra: str) -> str:
    """Versions, commit and hardware in one line.

    Args:
        device: cpu or cuda; meta has no hardware.
        extra: what there is to be said besides.
    """
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    facts = [f"dllm-jepa {__version__} (commit {commit})", f"torch {torch.__version__}"]
    facts.append(f"Python {platform.python_version()}")
    if device != "meta":
        facts += [platform.machine(), f"{os.cpu_count()} CPUs"]
    if device == "cuda":
        facts.append(torch.cuda.get_device_name())
    return ", ".join([*facts, *extra])


def resident(field: str) -> int:
    """Resident size of this process now (VmRSS) or at its peak (VmHWM), bytes; Linux."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> int:
    """Start a new peak of the resident size; returns the size now, bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def call_alone(script: str, call: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Any:
    """Run a script here in a process of its own; returns the last line that it prints.

    Args:
        script: path of the script; it has to understand `--alone CALL`.
        call: what it is to do, as JSON.
        environment: variables besides those of this process.
    """
    command = [sys.executable, script, "--alone", json.dumps(call)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | (environment or {}))
    return json.loads(done.stdout.splitlines()[-1])
