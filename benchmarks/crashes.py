"""Kill a run of two ranks at random moments, resume it each time, and compare it with one that was left alone.

    python benchmarks/crashes.py [--kills 30] [--seed 0] [--async-save] [--folder DIR]

Launcher and ranks are killed at once (SIGKILL): half of the times at any moment of the steps, a third within 40
milliseconds of the beginning of a save, the others while they start. Prints one JSON line a kill and a table last. Exit
code 1 if the weights at the end, or any other tensor of the training state, differ in a bit, or metrics.jsonl does not
have every step once.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dllm_jepa import __version__
from dllm_jepa.training import SavedCheckpoint

STEPS = 150
RUN = [
    *("--config", "tiny", f"max_steps={STEPS}", "dataset.num_pairs=2000", "model.num_layers=2", "export=null"),
    *("checkpoint.every_n_steps=3", "checkpoint.keep_last=2"),
]
MOMENTS = ("running", "saving", "running", "saving", "running", "starting")
TIMES = ("tokens_per_second", "step_seconds")


def launch(folder: Path, *overrides: str) -> subprocess.Popen[bytes]:
    """Start the run on two ranks; what it prints goes to a file beside the folder."""
    tune = Path(sys.executable).with_name("tune")
    command = [tune, "run", "--nproc_per_node", "2", "dllm_jepa_full", *RUN, f"output_dir={folder}", *overrides]
    with folder.with_suffix(".log").open("ab") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def processes_of(folder: Path) -> list[int]:
    """Launcher and ranks, told by their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"output_dir={folder}".encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return found


def steps_done(folder: Path) -> int:
    """Lines of metrics.jsonl."""
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def kill(folder: Path, chance: random.Random, moment: str, overrides: list[str]) -> dict[str, Any]:
    """Start or resume the run, and kill all of it at a random moment; returns what was seen."""
    process = launch(folder, "resume=auto", *overrides)
    checkpoints, status = folder / "checkpoints", folder / "status.json"
    before = status.stat().st_mtime_ns if status.exists() else 0

    def wait_for(happened: Callable[[], bool]) -> None:
        while not happened():
            if process.poll() is not None:
                raise SystemExit(f"the run ended by itself; see {folder.with_suffix('.log')}")
            time.sleep(0.0005)

    if moment == "starting":
        time.sleep(chance.uniform(0.5, 8.0))
    else:
        wait_for(lambda: status.exists() and status.stat().st_mtime_ns > before)  # it says that it runs
    if moment == "saving":
        wait_for(lambda: any(checkpoints.glob("*.unfinished")))
        time.sleep(chance.uniform(0.0, 0.04))
    elif moment == "running":
        time.sleep(chance.uniform(0.0, 2.0))
    for pid in processes_of(folder):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    saved = sorted(path.name for path in checkpoints.glob("step_*") if path.suffix == "")
    half_written = any(checkpoints.glob("*.unfinished")) or any(checkpoints.glob("*.removed*"))
    return {
        "while": moment,
        "steps": steps_done(folder),
        "newest_checkpoint": int(saved[-1].removeprefix("step_")) if saved else 0,
        "half_written": half_written and moment != "starting",  # then it is what an earlier kill has left
    }


def rows(folder: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without times."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def differing_tensors(folder: Path, reference: Path) -> list[str]:
    """Names of the tensors of the last training state that are not equal bit for bit."""
    name = f"checkpoints/step_{STEPS:08d}"
    states = [SavedCheckpoint(run / name) for run in (folder, reference)]
    for state in states:
        state.verify()
    types = {key: entry.properties.dtype for key, entry in states[0].tensors.items()}
    assert types.keys() == states[1].tensors.keys()
    return [key for key, dtype in types.items() if not torch.equal(*(state.read(key, dtype) for state in states))]


def main() -> None:
    """Run, kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--async-save", action="store_true")
    parser.add_argument(
        "--folder", type=Path, help="where the runs go; default: a temporary folder, removed at the end"
    )
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    reference, killed = folder / "reference", folder / "killed"
    overrides = ["checkpoint.async_save=true"] if arguments.async_save else []
    if launch(reference, *overrides).wait() != 0:
        raise SystemExit(f"the reference run failed; see {reference.with_suffix('.log')}")

    chance = random.Random(arguments.seed)
    kills = []
    for number in range(arguments.kills):
        kills.append(kill(killed, chance, MOMENTS[number % len(MOMENTS)], overrides))
        print(json.dumps({"kill": number + 1} | kills[-1]), flush=True)
    if launch(killed, "resume=auto", *overrides).wait() != 0:
        raise SystemExit(f"the last resume failed; see {killed.with_suffix('.log')}")

    same_metrics = rows(killed) == rows(reference)
    every_step_once = [row["step"] for row in rows(killed)] == list(range(1, STEPS + 1))
    different = differing_tensors(killed, reference)
    print(f"\ndllm-jepa {__version__}, torch {torch.__version__}, Python {platform.python_version()}\n")
    print("| kills | while starting | a checkpoint half written | steps lost, at most | metrics | tensors |")
    print("|---|---|---|---|---|---|")
    lost = max(one["steps"] - one["newest_checkpoint"] for one in kills)
    starting, half_written = sum(one["while"] == "starting" for one in kills), sum(one["half_written"] for one in kills)
    verdict = "same" if same_metrics and every_step_once else "differ"
    print(f"| {len(kills)} | {starting} | {half_written} | {lost} | {verdict} | {len(different)} differ |")
    if arguments.folder is None:
        shutil.rmtree(folder)
    sys.exit(0 if verdict == "same" and not different else 1)


if __name__ == "__main__":
    main()
