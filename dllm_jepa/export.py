"""From a training checkpoint to a Hugging Face directory: offline, without a GPU, one tensor at a time."""

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models import SHARD_BYTES, model_card, save_adapter, save_hf, save_merged
from dllm_jepa.trained_model import base_source, check_part, saved_model, saved_tokenizer, saved_weights
from dllm_jepa.training import SavedCheckpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def export_checkpoint(
    path: Path,
    out: Path,
    *,
    part: str = "online",
    dtype: str | None = None,
    like: Path | None = None,
    merged: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model of a checkpoint in its published layout, or its adapter in that of PEFT.

    Args:
        path: the checkpoint.
        out: directory to create.
        part: "online", the trained weights, or "target", those of the EMA target encoder with the trained head.
        dtype: "fp32" or "bf16"; None takes what the run would have exported. Adapters stay as they are.
        like: published directory to copy config.json and tokenizer files from; None takes the one that the run started
            from. For adapters it is their base.
        merged: of a run with adapters, write its base with the adapter merged into it.
        shard_bytes: largest size of a weight file in bytes.

    Raises:
        CheckpointError: if the checkpoint is damaged, has no such part, stands on another base, or `out` exists.
    """
    if out.exists():
        raise CheckpointError(f"{out} already exists; nothing is overwritten: choose another directory or remove it")
    checkpoint = SavedCheckpoint(path)
    checkpoint.verify()
    state, config = checkpoint.state, OmegaConf.load(checkpoint.config)
    base = like or (None if state["base"] is None else Path(state["base"]))
    if base is not None and not base.is_dir():
        what = f"--like {base}" if like else f"the run started from {base}, which"
        raise CheckpointError(
            f"{what} is not a directory here; give the one to copy config.json and the tokenizer from by --like"
        )
    model = saved_model(checkpoint)
    check_part(checkpoint, part)
    if merged and model.lora is None:
        raise CheckpointError(f"{path} is of full fine-tuning: there is no adapter to merge; leave out --merged")
    stored = DTYPES[dtype or config.export_dtype or config.compute_dtype]
    files: dict[str, Any] = {
        "tokenizer": saved_tokenizer(checkpoint) if base is None else None,
        "card": model_card(part, state, checkpoint.config.read_text(encoding="utf-8")),
    }
    weights = saved_weights(checkpoint, model, part, stored)
    if model.lora is None:
        names = len(model.state_dict())
        bar = tqdm(weights, total=names, desc="exporting", unit=" tensors", disable=None)
        save_hf(model, out, base, stored, weights=bar, shard_bytes=shard_bytes, **files)
        return
    read, adapters = base_source(model, state, base).read, dict(weights)
    if merged:
        save_merged(model, out, read, adapters, like=base, dtype=stored, shard_bytes=shard_bytes, **files)
    else:
        save_adapter(model, out, adapters, base=base, **files)
