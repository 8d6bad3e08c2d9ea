"""Writing a model in its published layout: sharded safetensors, index, config.json, and the files that go with it."""

import itertools
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models._families import FAMILIES
from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM
from dllm_jepa.models._tokenizer import Tokenizer
from dllm_jepa.models.files._directory import Prompt, export_directory, write_json, write_tensors
from dllm_jepa.models.files._reader import INDEX_NAME, HFCheckpoint

SHARD_BYTES = 5 * 10**9
"""Largest size of a weight file, as published."""

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
    prompt: Prompt | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model so that the published class (and `load_hf`) loads it.

    The files are written beside `path` and renamed, so `path` appears complete or not at all. No more than one
    file's tensors are held in memory beside the model.

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
        prompt: prompt format of the training, written to dllm_jepa.json; None writes none.
        shard_bytes: largest size of a weight file in bytes.

    Raises:
        CheckpointError: if `path` exists or cannot be written, or `like` is a checkpoint of another architecture.
    """
    template = None if like is None else HFCheckpoint(like)
    if template is not None and (differences := template.architecture_differences(model)):
        raise CheckpointError(f"a model cannot be written like {like}: {'; '.join(differences)}")
    named = weights if weights is not None else model.state_dict().items()
    with export_directory(Path(path), card, prompt) as directory:
        _write_shards(model, directory, named, dtype, shard_bytes)
        if template is not None:
            for file in {file for pattern in _COPIED for file in template.path.glob(pattern)}:
                shutil.copyfile(file, directory / file.name)
            return
        config = FAMILIES[model.family].config(model.sizes)
        if tokenizer is not None:
            tokenizer.save(directory)
            config |= {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("mask", "eos", "pad", "bos")}
        write_json(directory / "config.json", config)


def _write_shards(
    model: MaskedDiffusionLM,
    directory: Path,
    named: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> None:
    names = FAMILIES[model.family].hf_names(model.sizes)
    shapes = {names[name]: (dtype or weight.dtype, weight.shape) for name, weight in model.state_dict().items()}
    sizes = {name: math.prod(shape) * stored.itemsize for name, (stored, shape) in shapes.items()}
    shards = list(_plan_shards(sizes, shard_bytes))
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    stream = iter(named)
    for file, members in zip(files, shards, strict=True):
        tensors: dict[str, Tensor] = {}
        for expected, (name, weight) in zip(members, itertools.islice(stream, len(members)), strict=True):
            stored, shape = shapes[expected]
            if names[name] != expected or weight.shape != shape:
                raise AssertionError(f"{name} {tuple(weight.shape)} arrived in place of {expected} {tuple(shape)}")
            tensors[expected] = weight.detach().to("cpu", stored).contiguous()
        write_tensors(directory / file, tensors)
        del tensors, weight  # before those of the next file are gathered
    index = {
        "metadata": {"total_size": sum(sizes.values())},
        "weight_map": {member: file for file, members in zip(files, shards, strict=True) for member in members},
    }
    write_json(directory / INDEX_NAME, index)


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
