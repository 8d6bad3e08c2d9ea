"""Saving and exporting: how long a save stops the run, what it takes on disk, and how much memory an export needs.

    python benchmarks/checkpointing.py [--embed-dim 512] [--layers 16] [--vocab 32000] [--saves 7] [--folder DIR]

The state is that of a full fine-tuning with AdamW and an EMA target encoder. Synchronous and asynchronous saves
alternate; the floor of an asynchronous one is the copy of all tensors into memory that is there already. The export
runs in a process of its own (Linux), whose peak is taken above what it holds after its imports. Prints one JSON line a
measurement and a table last.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _machine import describe_machine, forget_peak, resident

from dllm_jepa.export import export_checkpoint
from dllm_jepa.jepa import EMATargetEncoder
from dllm_jepa.models.llada import llada
from dllm_jepa.training import CheckpointWriter, Ranks, SavedCheckpoint, TrainingState

CONFIG = "tokenizer: {_component_: dllm_jepa.models.tiny.tiny_tokenizer}\ncompute_dtype: bf16\nexport_dtype: null\n"


def live_state(embed_dim: int, num_layers: int, vocab_size: int) -> tuple[TrainingState, dict[str, Any], int]:
    """The state of a run after one step, what a checkpoint says of it, and its number of trained parameters."""
    sizes = {"vocab_size": vocab_size, "embed_dim": embed_dim, "num_layers": num_layers, "num_heads": 8}
    model, copy = (llada(**sizes, mlp_dim=4 * embed_dim) for _ in range(2))
    target_encoder = EMATargetEncoder(copy.backbone, ema_decay=0.996)
    trained = torch.nn.ModuleDict({"model": model})
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-5)
    for param in trained.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    facts = {
        "seed": 0,
        "base": None,
        "world_size": 1,
        "versions": {"torch": torch.__version__},
        "model": {"family": model.family, "sizes": asdict(model.sizes)},
        "data": {"source": "none", "sequences": 0, "sha256": ""},
        "metrics": {},
    }
    state = TrainingState(trained, optimizer, None, parts={"target": target_encoder})
    return state, facts, sum(param.numel() for param in trained.parameters())


def time_saves(state: TrainingState, facts: dict[str, Any], folder: Path, saves: int) -> dict[str, list[float]]:
    """Seconds that the caller waits for a save of either kind, until an asynchronous one is done, and for a copy."""
    ranks = Ranks.join("cpu")
    writers = {
        kind: CheckpointWriter(
            folder / kind, ranks, config_yaml=CONFIG, facts=facts, keep_last=1, async_save=kind == "async"
        )
        for kind in ("sync", "async")
    }
    buffers = {name: torch.empty_like(tensor) for name, tensor in state.tensors().items()}
    seconds: dict[str, list[float]] = {"sync": [], "async": [], "async, written": [], "copy": []}
    for step in range(1, saves + 2):
        for kind, writer in writers.items():
            start = time.perf_counter()
            writer.save(step, state.tensors(), state.numbers())
            seconds[kind].append(time.perf_counter() - start)
            writer.finish()
            if kind == "async":
                seconds["async, written"].append(time.perf_counter() - start)
        start = time.perf_counter()
        for name, tensor in state.tensors().items():
            buffers[name].copy_(tensor)
        seconds["copy"].append(time.perf_counter() - start)
    for writer in writers.values():
        writer.close()
    return {kind: values[1:] for kind, values in seconds.items()}  # the first save makes its buffers


def peak_of_export(checkpoint: Path, folder: Path, shard_bytes: int) -> int:
    """Peak memory of an export above that of its process after its imports, bytes."""
    command = [sys.executable, __file__, "--export", str(checkpoint), str(folder), str(shard_bytes)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def export_and_print_peak(checkpoint: str, out: str, shard_bytes: str) -> None:
    """The process that `peak_of_export` starts."""
    before = forget_peak()  # the peak so far is that of the imports
    export_checkpoint(Path(checkpoint), Path(out), shard_bytes=int(shard_bytes))
    print(resident("VmHWM") - before)


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--export"]:
        export_and_print_peak(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embed-dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--saves", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure; default: a temporary one")
    arguments = parser.parse_args()
    state, facts, num_params = live_state(arguments.embed_dim, arguments.layers, arguments.vocab)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        seconds = {
            kind: statistics.median(values)
            for kind, values in time_saves(state, facts, folder, arguments.saves).items()
        }
        print(json.dumps({kind: round(value, 4) for kind, value in seconds.items()}))
        checkpoint = SavedCheckpoint(folder / "sync" / "latest")
        on_disk = sum(file.stat().st_size for file in checkpoint.path.iterdir())
        # As large, against the largest tensor in fp32, as the published 5 GB are against LLaDA-8B's embedding.
        shard_bytes = int(4 * arguments.vocab * arguments.embed_dim * 5e9 / (4 * 126_464 * 4096))
        peak = peak_of_export(checkpoint.path, folder / "hf", shard_bytes)
        shards = sorted(file.stat().st_size for file in (folder / "hf").glob("*.safetensors"))
    print(json.dumps({"parameters": num_params, "bytes_on_disk": on_disk, "export_peak": peak, "shards": shards}))
    print(f"\n{describe_machine()}; {num_params / 1e6:.1f} M parameters, AdamW and EMA in fp32\n")
    print("| | |\n|---|---|")
    print(f"| stall of an asynchronous save / of a synchronous one | {seconds['async'] / seconds['sync']:.3f} |")
    print(f"| stall of an asynchronous save / copy of all tensors | {seconds['async'] / seconds['copy']:.2f} |")
    print(
        f"| asynchronous save until it is on the disk / synchronous one | "
        f"{seconds['async, written'] / seconds['sync']:.2f} |"
    )
    print(f"| bytes on disk per trained parameter | {on_disk / num_params:.3f} |")
    print(f"| peak memory of an export / its largest shard, {shards[-1] / 1e6:.0f} MB | {peak / shards[-1]:.2f} |")


if __name__ == "__main__":
    main()
