"""Writing a model in its published layout: sharded safetensors, index, config.json and the files of its origin."""

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models._export_directory import export_directory
from dllm_jepa.models._families import FAMILIES
from dllm_jepa.models._hf_reader import INDEX_NAME, HFCheckpoint
from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM
from dllm_jepa.models._tokenizer import Tokenizer

SHARD_BYTES = 5 * 10**9
"""Largest size of a weight file, as published."""

_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}

_COPIED = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "*.py",
)


def save_hf(
    model: MaskedDiffusionLM,
    path: str | Path,
    like: str | Path | None = None,
    dtype: torch.dtype | None = None,
    *,
    weights: Iterable[tuple[str, Tensor]] | None = None,
    tokenizer: Tokenizer | None = None,
    card: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model so that the published class (and `load_hf`) loads it.

    The files are written beside `path` and renamed, so `path` appears complete or not at all. No more than one
    tensor is held in memory beside the model.

    Args:
        model: the model; it gives the names, the family and the sizes.
        path: directory to create.
        like: published directory to copy config.json, generation_config.json, tokenizer files and `*.py` from,
            unchanged. None writes config.json from the model's sizes.
        dtype: type to store; None keeps each weight's own.
        weights: (name, full tensor) in the order of `model.state_dict()`, for a model whose own parameters are sharded.
            None takes them from the model.
        tokenizer: without `like`, its files are written and its special ids go into config.json.
        card: text of README.md, the model card; None writes none.
        shard_bytes: largest size of a weight file in bytes.

    Raises:
        CheckpointError: if `path` exists or cannot be written, or `like` is a checkpoint of another architecture.
    """
    origin = None if like is None else HFCheckpoint(like)
    if origin is not None and (differences := origin.architecture_differences(model)):
        raise CheckpointError(f"a model cannot be written like {like}: {'; '.join(differences)}")
    named = weights if weights is not None else model.state_dict().items()
    with export_directory(Path(path), card) as directory:
        _write_shards(model, directory, named, dtype, shard_bytes)
        _write_rest(model, directory, origin, tokenizer)


def _write_rest(
    model: MaskedDiffusionLM, directory: Path, origin: HFCheckpoint | None, tokenizer: Tokenizer | None
) -> None:
    if origin is not None:
        for file in {file for pattern in _COPIED for file in origin.path.glob(pattern)}:
            shutil.copyfile(file, directory / file.name)
        return
    config = FAMILIES[model.family].config(model.sizes)
    if tokenizer is not None:
        tokenizer.save(directory)
        config |= {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("mask", "eos", "pad", "bos")}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_shards(
    model: MaskedDiffusionLM,
    directory: Path,
    named: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> None:
    names = FAMILIES[model.family].hf_names(model.sizes)
    specs = {names[name]: (dtype or weight.dtype, tuple(weight.shape)) for name, weight in model.state_dict().items()}
    sizes = {name: math.prod(shape) * stored.itemsize for name, (stored, shape) in specs.items()}
    shards = list(_plan_shards(sizes, shard_bytes))
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    stream = iter(named)
    for file, members in zip(files, shards, strict=True):
        _stream_safetensors(directory / file, {member: specs[member] for member in members}, stream, names)
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {member: file for file, members in zip(files, shards, strict=True) for member in members},
    }
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _stream_safetensors(
    path: Path,
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    stream: Iterator[tuple[str, Tensor]],
    names: Mapping[str, str],
) -> None:
    """Write a file one tensor at a time; the library's own writer needs all of them at once.

    Source: format of https://github.com/huggingface/safetensors: size of the header in 8 bytes, the header in JSON,
    padded to 8 bytes, and the tensors without gaps.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in specs.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for expected, (dtype, shape) in specs.items():
            name, weight = next(stream)
            if names[name] != expected or weight.shape != shape:
                raise AssertionError(f"{name} {tuple(weight.shape)} arrived in place of {expected} {shape}")
            stored = weight.detach().to("cpu", dtype).contiguous()
            file.write(stored.reshape(-1).view(torch.uint8).numpy().data)
            del weight, stored  # before the next one is gathered


def _plan_shards(sizes: Mapping[str, int], shard_bytes: int) -> Iterator[list[str]]:
    members: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if members and filled + size > shard_bytes:
            yield members
            members, filled = [], 0
        members.append(name)
        filled += size
    yield members
