"""From a training checkpoint to a Hugging Face directory: offline, without a GPU, one tensor at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models import (
    FAMILIES,
    SHARD_BYTES,
    HFCheckpoint,
    InitialWeights,
    LoRASettings,
    MaskedDiffusionLM,
    Tokenizer,
    TransformerSizes,
    add_lora,
    model_card,
    save_adapter,
    save_hf,
    save_merged,
)
from dllm_jepa.models.dream import dream_tokenizer
from dllm_jepa.models.llada import llada_tokenizer
from dllm_jepa.models.tiny import tiny_tokenizer
from dllm_jepa.training import SavedCheckpoint, check_trained, trained_tensors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# A config names functions to call; of a file that somebody else may have written only these are called. The whole path
# is compared: by way of a module's own imports a longer one leads anywhere.
_TRUSTED = {
    "dllm_jepa.models.dream.dream_tokenizer": dream_tokenizer,
    "dllm_jepa.models.llada.llada_tokenizer": llada_tokenizer,
    "dllm_jepa.models.tiny.tiny_tokenizer": tiny_tokenizer,
}


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
    model = _build(state["model"])
    check_trained(checkpoint, "model", model)
    if part == "target" and not any(name.startswith("target.") for name in checkpoint.tensors):
        raise CheckpointError(f"{path} has no target encoder: its run had jepa_weight: 0. Export the online model")
    if merged and model.lora is None:
        raise CheckpointError(f"{path} is of full fine-tuning: there is no adapter to merge; leave out --merged")
    stored = DTYPES[dtype or config.export_dtype or config.compute_dtype]
    files: dict[str, Any] = {
        "tokenizer": _tokenizer(config) if base is None else None,
        "card": model_card(part, state, checkpoint.config.read_text(encoding="utf-8")),
    }
    if model.lora is None:
        weights = _weights(checkpoint, model, part, stored)
        save_hf(model, out, base, stored, weights=weights, shard_bytes=shard_bytes, **files)
        return
    read, adapters = _base(model, state, base).read, _adapters(checkpoint, model, part)
    if merged:
        save_merged(model, out, read, adapters, like=base, dtype=stored, shard_bytes=shard_bytes, **files)
    else:
        save_adapter(model, out, adapters, base=base, **files)


def _build(saved: dict[str, Any]) -> MaskedDiffusionLM:
    if saved["family"] not in FAMILIES:
        raise CheckpointError(
            f"the checkpoint is of the family {saved['family']!r}; known: {', '.join(sorted(FAMILIES))}. A family of "
            "your own is exported by its recipe: resume=CHECKPOINT with as many max_steps as the checkpoint has"
        )
    with torch.device("meta"):
        model = FAMILIES[saved["family"]].build(TransformerSizes(**saved["sizes"]))
        if saved.get("lora") is None:
            return model
        return add_lora(model, LoRASettings(**saved["lora"]))


def _base(model: MaskedDiffusionLM, state: dict[str, Any], base: Path | None) -> HFCheckpoint | InitialWeights:
    """What the adapters stand on."""
    if base is None:
        return InitialWeights(model, seed=state["seed"], num_layers=model.sizes.num_layers)
    origin = HFCheckpoint(base)
    origin.check(model)
    if origin.fingerprint() != state["base_weights"]:
        raise CheckpointError(
            f"the adapters were trained on other weights than those of {base}; give the directory of their base, which "
            f"was {state['base']}, by --like"
        )
    return origin


def _adapters(checkpoint: SavedCheckpoint, model: MaskedDiffusionLM, part: str) -> dict[str, Tensor]:
    prefix = "target." if part == "target" else "trained.model."
    return {name: checkpoint.read(f"{prefix}{name}", torch.float32) for name in trained_tensors(model)}


def _weights(
    checkpoint: SavedCheckpoint, model: MaskedDiffusionLM, part: str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name in tqdm(model.state_dict(), desc="exporting", unit=" tensors", disable=None):
        is_average = part == "target" and name.startswith("backbone.")
        saved = f"target.{name.removeprefix('backbone.')}" if is_average else f"trained.model.{name}"
        yield name, checkpoint.read(saved, dtype)


def _tokenizer(config: Any) -> Tokenizer:
    arguments = {str(key): value for key, value in config.tokenizer.items()}
    path = arguments.pop("_component_")
    if path not in _TRUSTED:
        raise CheckpointError(
            f"the run's tokenizer {path} is not of this package, and code that a checkpoint names is not run; give a "
            "directory with its files and config.json by --like"
        )
    return _TRUSTED[path](**arguments)
