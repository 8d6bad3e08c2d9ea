"""Peak memory of a step for every 8B config: computed, and with --measure held against what a GPU says.

    python benchmarks/memory.py
    python benchmarks/memory.py --measure llada_8b_qlora

Prints one JSON line a config and a table last. A measured run trains three steps of the config on generated data, from
random weights and as many tokens per micro-batch as the config has; the peak is the one that the run logs.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from dllm_jepa import __version__
from dllm_jepa.config import Training, load_config, recipe_config
from dllm_jepa.memory import step_memory

# (config, GPUs)
RUNS = (
    ("llada_8b", 4),
    ("llada_8b", 8),
    ("dream_7b", 4),
    ("dream_7b", 8),
    ("llada_8b_single_gpu", 1),
    ("dream_7b_single_gpu", 1),
    ("llada_8b_lora", 1),
    ("dream_7b_lora", 1),
    ("llada_8b_qlora", 1),
    ("dream_7b_qlora", 1),
)

_GENERATED_DATA = (
    "checkpoint_dir=null",
    "tokenizer={_component_: dllm_jepa.models.tiny.tiny_tokenizer}",
    "dataset={_component_: dllm_jepa.data.regex_pairs, num_pairs: 2000, mask_prompt: true}",
    "global_batch_size=512",
    "max_steps=3",
    "export=null",
    "checkpoint.every_n_steps=null",
)


def config_of(name: str) -> Training:
    """A packaged config, with stand-ins for what only a user has."""
    cfg = recipe_config("dllm_jepa_full").check(load_config(["--config", name, "output_dir=.", "checkpoint_dir=."]))
    assert isinstance(cfg, Training), type(cfg)
    return cfg


def measure(name: str) -> float:
    """Peak memory in GiB of three real steps on this machine's GPU."""
    recipe = "dllm_jepa_lora" if "lora" in name else "dllm_jepa_full"
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", recipe, "--config", name, f"output_dir={run}", *_GENERATED_DATA]
        subprocess.run(command, check=True, stdout=sys.stderr)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return max(float(row["peak_memory_gib"]) for row in rows)


def main() -> None:
    """Read the arguments, compute, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", metavar="CONFIG", help="run this config on one GPU and compare")
    args = parser.parse_args()
    print(f"dllm-jepa {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    lines = []
    for name, num_gpus in RUNS if args.measure is None else ((args.measure, 1),):
        cfg = config_of(name)
        table = step_memory(cfg, num_gpus)
        rows = {row: round(num_bytes / 2**30, 2) for row, num_bytes in table.rows()}
        record = {"config": name, "gpus": num_gpus, "tokens_per_device": cfg.tokens_per_device, "gib": rows}
        if args.measure is not None:
            record |= {"gpu": torch.cuda.get_device_name(), "measured_gib": round(measure(name), 2)}
        print(json.dumps(record | {"optimizer": cfg.optimizer.path}), flush=True)
        lines.append(f"| `{name}` | {num_gpus} | {cfg.tokens_per_device:,} | {table.total / 2**30:.1f} GiB |")
        if args.measure is not None:
            lines[-1] += f" {record['measured_gib']:.1f} GiB |"
    measured = " measured |" if args.measure is not None else ""
    print(f"\n| config | GPUs | tokens per micro-batch | peak per GPU |{measured}")
    print("|---|---|---|---|" + "---|" * bool(measured))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
