"""Checkpoints of a few numbers, written the way a run writes its own."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_jepa.training import CheckpointWriter, Ranks
from dllm_jepa.training.checkpoint._manifest import record_of, write_manifest

ONE_PROCESS = Ranks.join("cpu")
FINGERPRINT = {"seed": 3, "world_size": 1, "versions": {"python": "3.11.7"}, "data": {"sha256": "ab", "sequences": 5}}


def writer(directory: Path, **options: Any) -> CheckpointWriter:
    return CheckpointWriter(directory, ONE_PROCESS, config_yaml="a: 1\n", fingerprint=FINGERPRINT, **options)


def tensors(step: int) -> dict[str, Tensor]:
    """Tensors that say which step they are of."""
    weight = torch.full((4, 3), float(step))
    return {"trained.model.weight": weight, "target.weight": weight - 1, "optimizer.step": torch.tensor(float(step))}


def save(directory: Path, step: int, **options: Any) -> Path:
    """Write one; returns where it is."""
    saver = writer(directory, **options)
    saver.save(step, tensors(step), {"metrics": {"step": step}})
    saver.close()
    return directory / f"step_{step:08d}"


def flip_a_byte(file: Path, position: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def forge(checkpoint: Path, **contents: bytes) -> None:
    """Replace files, and the manifest with them, as somebody would who means harm."""
    for name, content in contents.items():
        (checkpoint / name).write_bytes(content)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, {path.name: record_of(path) for path in checkpoint.iterdir()})
