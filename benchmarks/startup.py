"""Time until a run has done its first steps: imports, check of the config, reading the weights, first and second step.

    python benchmarks/startup.py [--embed-dim 256] [--num-layers 6] ... [--folder DIR]
    python benchmarks/startup.py --checkpoint LLaDA-8B-Base --device cuda --dtype bf16 --num-tokens 512

Without --checkpoint, a LLaDA of random weights is written in its published layout and read again. Every row of the
table is a process of its own, which takes steps of full fine-tuning with JEPA, as the recipe does, on generated data.

Cold: the kernel was asked to forget the checkpoint's files (it may not do so, and a disk has a cache of its own), but
Python's own files are in its page cache. Warm: the files were just read. Compiled steps are measured twice: with an
empty cache of compiled code, and with what the run before left there. Prints one JSON line a process and a table last.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from _machine import call_alone, describe_machine
from _steps import ARMS, DTYPES, SIZES, Setting, Trainer

from dllm_jepa.config import load_config, recipe_config
from dllm_jepa.models import HFCheckpoint, save_hf
from dllm_jepa.models.llada import llada
from dllm_jepa.training import materialize

PHASES = ("imports", "config", "weights", "other_setup", "first_step", "second_step")

# (name, arm, the checkpoint's files are cold); compiled code is kept from one process to the next.
RUNS = (
    ("eager, cold", "jepa", True),
    ("eager, warm", "jepa", False),
    ("compiled, nothing kept", "jepa_compiled", False),
    ("compiled, code kept", "jepa_compiled", False),
)


def setting_of(checkpoint: Path, setting: Setting) -> Setting:
    """The setting with the sizes of a checkpoint."""
    sizes = HFCheckpoint(checkpoint).sizes
    return replace(setting, **{name: getattr(sizes, name) for name in SIZES})


def write_checkpoint(setting: Setting, path: Path) -> None:
    """Random weights in the published layout, in bf16 as published."""
    torch.manual_seed(0)
    sizes = {name: getattr(setting, name) for name in SIZES}
    save_hf(llada(**sizes, max_seq_len=setting.num_tokens), path, dtype=torch.bfloat16)


def forget_files(folder: Path) -> None:
    """Ask the kernel to drop the files of a folder from its page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # what is not on the disk yet cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def start_up(setting: Setting, arm: str, *, checkpoint: str, started: float) -> dict[str, float]:
    """Seconds of every phase of this process.

    Args:
        setting: model and data.
        arm: kind of the steps.
        checkpoint: directory of the weights.
        started: when the process was started, seconds since the epoch.
    """
    ends = [started, time.time()]
    torch.set_num_threads(setting.threads)
    recipe_config("dllm_jepa_full").check(
        load_config(["--config", "llada_8b", f"checkpoint_dir={checkpoint}", "output_dir=run"])
    )
    ends.append(time.time())
    files = HFCheckpoint(checkpoint)
    with torch.device("meta"):
        model = llada(**{name: getattr(setting, name) for name in SIZES}, max_seq_len=setting.num_tokens)
    files.check(model)
    materialize(model, files.read, dtype=DTYPES[setting.dtype], device=torch.device(setting.device))
    ends.append(time.time())
    trainer = Trainer(setting, [ARMS[arm]], checkpointing=False, model=model)
    ends.append(time.time())
    for number in range(2):
        trainer.step(ARMS[arm], number)
        ends.append(time.time())
    return {phase: end - start for phase, start, end in zip(PHASES, ends[:-1], ends[1:], strict=True)}


def measure(setting: Setting, checkpoint: Path, compiled_code: Path) -> dict[str, dict[str, float]]:
    """Seconds of every phase, by the name of the run; prints them as they come."""
    rows = {}
    for name, arm, is_cold in RUNS:
        if is_cold:
            forget_files(checkpoint)
        call = {"setting": asdict(setting), "arm": arm, "checkpoint": str(checkpoint), "started": time.time()}
        rows[name] = call_alone(__file__, call, {"TORCHINDUCTOR_CACHE_DIR": str(compiled_code)})
        print(json.dumps({"run": name} | {phase: round(value, 3) for phase, value in rows[name].items()}), flush=True)
    return rows


def print_table(rows: Mapping[str, Mapping[str, float]], num_bytes: int) -> None:
    """Seconds of every phase, and the speed of reading."""
    names = [phase.replace("_", " ") for phase in PHASES]
    print(f"\n| seconds | {' | '.join(names)} | until the first step is done | weights, GB/s |")
    print("|---" * (len(PHASES) + 3) + "|")
    for name, row in rows.items():
        seconds = [row[phase] for phase in PHASES]
        cells = [f"{value:.2f}" for value in (*seconds, sum(seconds[:-1]), num_bytes / row["weights"] / 1e9)]
        print(f"| {name} | {' | '.join(cells)} |")


def read_arguments(words: list[str]) -> tuple[Setting, argparse.Namespace]:
    """The setting, each field an option, and where the weights are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Setting.add_options(parser)
    parser.add_argument("--checkpoint", type=Path, help="a published LLaDA; it gives the sizes of the model")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure; default: a temporary one")
    arguments = parser.parse_args(words)
    setting = Setting.from_options(arguments)
    return setting if arguments.checkpoint is None else setting_of(arguments.checkpoint, setting), arguments


def main(words: list[str]) -> None:
    """Measure and print."""
    if words[:1] == ["--alone"]:
        call: dict[str, Any] = json.loads(words[1])
        print(json.dumps(start_up(Setting(**call.pop("setting")), **call)))
        return
    setting, arguments = read_arguments(words)
    print(
        f"{describe_machine(setting.device, f'{setting.threads} threads')}\n{json.dumps(asdict(setting))}", flush=True
    )
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        checkpoint = arguments.checkpoint or Path(name) / "checkpoint"
        if arguments.checkpoint is None:
            write_checkpoint(setting, checkpoint)
        num_bytes = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        print(json.dumps({"bytes_of_weights": num_bytes}), flush=True)
        print_table(measure(setting, checkpoint, Path(name) / "compiled"), num_bytes)


if __name__ == "__main__":
    main(sys.argv[1:])
