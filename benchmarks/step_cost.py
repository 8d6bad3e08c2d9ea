"""Time and peak memory of whole training steps, against steps that score every position.

    python benchmarks/step_cost.py [--embed-dim 256] [--num-layers 6] ... [--arms jepa diffusion]
    python benchmarks/step_cost.py --profile jepa
    python benchmarks/step_cost.py --device cuda --embed-dim 4096 --num-layers 32 --num-heads 32 --mlp-dim 12288 \
        --vocab-size 126464 --num-sequences 16 --num-tokens 512 --dtype bf16 --checkpointing on

The arms train one model. `diffusion` and `jepa` are the steps of the full recipe in packed rows, `..._padded` the same
in padded rows, `..._compiled` with compiled layers, `jepa_float8` with a target branch in float8 (GPU only).
`--shortest` draws lengths, which is where packed and padded rows differ. Two references, written here in the usual way,
compute the logits [B, T, V] of all tokens at once: `full_diffusion` has a loss at every position, `full_head_diffusion`
at the masked ones only.

Times: all arms alternately in one process, which holds one set of weights for all of them, medians. Memory: every arm
in a process of its own, its peak above what the process holds after its imports (CPU: resident size, Linux; CUDA:
allocated). The peak of compiled arms on a CPU would be that of the compiler: it is left out. Prints one JSON line a
measurement and a table last. On CPU only the ratios mean anything.

glibc may keep freed memory, which then counts as resident. With `--mmap-threshold BYTES` it gives back every block from
this size on at once (MALLOC_MMAP_THRESHOLD_), which takes time; it holds for all processes alike, timed ones too.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from _machine import call_alone, describe_machine, forget_peak, resident
from _steps import ARMS, Setting, Trainer

WARM_UP = 3  # steps of every arm that are not timed

# (above, below, limit of the time, limit of the memory), each limit (without, with) activation checkpointing.
RATIOS: list[tuple[str, str, tuple[float, float] | None, tuple[float, float] | None]] = [
    ("jepa", "full_diffusion", (0.58, 0.75), (0.62, 0.45)),
    ("jepa", "full_head_diffusion", None, None),
    ("diffusion", "full_diffusion", None, None),
    ("jepa", "diffusion", (1.25, 1.25), None),
    ("jepa_compiled", "diffusion_compiled", (1.25, 1.25), None),
    ("jepa_float8", "diffusion", (1.15, 1.15), None),
    ("jepa_float8_compiled", "diffusion_compiled", (1.15, 1.15), None),
    ("jepa_compiled", "jepa", None, None),
    ("jepa", "jepa_padded", None, None),
    ("diffusion", "diffusion_padded", None, None),
]


def time_steps(setting: Setting, names: Sequence[str], *, checkpointing: bool, steps: int) -> dict[str, list[float]]:
    """Seconds of every step of every arm, taken in turn, every other round backwards."""
    torch.set_num_threads(setting.threads)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    trainer = Trainer(setting, [ARMS[name] for name in names], checkpointing=checkpointing)
    for number in range(WARM_UP + steps):
        for name in names if number % 2 else reversed(names):
            start = time.perf_counter()
            trainer.step(ARMS[name], number)
            seconds[name].append(time.perf_counter() - start)
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def peak_memory(setting: Setting, name: str, *, checkpointing: bool) -> int:
    """Bytes at the peak of some steps of an arm above what this process holds now."""
    torch.set_num_threads(setting.threads)
    before = forget_peak() if setting.device == "cpu" else 0
    trainer = Trainer(setting, [ARMS[name]], checkpointing=checkpointing)
    for number in range(WARM_UP):
        trainer.step(ARMS[name], number)
    return resident("VmHWM") - before if setting.device == "cpu" else torch.cuda.max_memory_allocated()


def profile(setting: Setting, name: str, *, checkpointing: bool, steps: int = 5) -> str:
    """The operators that take most of the time of an arm, as a table."""
    torch.set_num_threads(setting.threads)
    trainer = Trainer(setting, [ARMS[name]], checkpointing=checkpointing)
    for number in range(WARM_UP):
        trainer.step(ARMS[name], number)
    with torch.profiler.profile() as profiler:
        for number in range(WARM_UP, WARM_UP + steps):
            trainer.step(ARMS[name], number)
    return str(profiler.key_averages().table(sort_by=f"self_{setting.device}_time_total", row_limit=15))


def measure(setting: Setting, arguments: argparse.Namespace, *, checkpointing: bool) -> dict[str, dict[str, Any]]:
    """Memory and time of the arms, by name; prints them as they come."""
    environment = {}
    if arguments.mmap_threshold is not None:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(arguments.mmap_threshold)
    common = {"setting": asdict(setting), "checkpointing": checkpointing}
    rows: dict[str, dict[str, Any]] = {}
    for name in arguments.arms:
        rows[name] = {"arm": name, "activation_checkpointing": checkpointing}
        if setting.device == "cuda" or not ARMS[name].compiled:
            peak = call_alone(__file__, common | {"measure": "peak_memory", "name": name}, environment)
            rows[name]["peak_mib"] = round(peak / 2**20, 1)
            print(json.dumps(rows[name]), flush=True)
    call = common | {"measure": "time_steps", "names": arguments.arms, "steps": arguments.steps}
    for name, seconds in call_alone(__file__, call, environment).items():
        rows[name]["step_s"] = round(statistics.median(seconds), 4)
        print(json.dumps(rows[name]), flush=True)
    return rows


def ratio_lines(rows: Mapping[str, Mapping[str, Any]], *, checkpointing: bool) -> list[str]:
    """Rows of the table of ratios, with the limits that the design sets them."""
    lines = []
    for above, below, *limits in RATIOS:
        if above not in rows or below not in rows:
            continue
        cells = [f"{above} / {below}", "on" if checkpointing else "off"]
        for key, limit in zip(("step_s", "peak_mib"), limits, strict=True):
            known = key in rows[above] and key in rows[below]
            cells.append(f"{rows[above][key] / rows[below][key]:.3f}" if known else "")
            cells.append("" if limit is None else f"{limit[checkpointing]:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def read_arguments(words: list[str]) -> tuple[Setting, argparse.Namespace]:
    """The setting, each field an option, and what is to be done with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Setting.add_options(parser)
    parser.add_argument("--steps", type=int, default=30, help="timed steps of every arm")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="default: all that the device can run")
    parser.add_argument("--checkpointing", choices=("off", "on", "both"), default="both")
    parser.add_argument("--mmap-threshold", type=int, metavar="BYTES", help="see above; default: as glibc chooses")
    parser.add_argument("--profile", choices=ARMS, help="print what takes the time of an arm instead")
    arguments = parser.parse_args(words)
    runs = [name for name, arm in ARMS.items() if arguments.device == "cuda" or not arm.float8]
    arguments.arms = arguments.arms or runs
    for name in {*arguments.arms, *filter(None, [arguments.profile])} - {*runs}:
        parser.error(f"{name} needs --device cuda: a CPU emulates float8, and its time says nothing; leave the arm out")
    return Setting.from_options(arguments), arguments


def main(words: list[str]) -> None:
    """Measure and print."""
    if words[:1] == ["--alone"]:
        call = json.loads(words[1])
        function = {"peak_memory": peak_memory, "time_steps": time_steps}[call.pop("measure")]
        print(json.dumps(function(Setting(**call.pop("setting")), **call)))
        return
    setting, arguments = read_arguments(words)
    kinds = [False, True] if arguments.checkpointing == "both" else [arguments.checkpointing == "on"]
    print(describe_machine(setting.device, f"{setting.threads} threads"))
    print(
        json.dumps(asdict(setting) | {key: getattr(arguments, key) for key in ("steps", "mmap_threshold")}), flush=True
    )
    if arguments.profile is not None:
        print(profile(setting, arguments.profile, checkpointing=kinds[0]))
        return
    lines = []
    for checkpointing in kinds:
        lines += ratio_lines(measure(setting, arguments, checkpointing=checkpointing), checkpointing=checkpointing)
    print("\n| ratio | activation checkpointing | time | limit | peak memory | limit |\n|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main(sys.argv[1:])
