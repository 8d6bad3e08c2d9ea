"""From a training state or an adapter to a Hugging Face directory: offline, without a GPU."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models import (
    DTYPES,
    SHARD_BYTES,
    OpenedAdapter,
    is_adapter_directory,
    model_card,
    read_prompt,
    save_adapter,
    save_hf,
    save_merged,
)
from dllm_jepa.trained_model import SavedModel
from dllm_jepa.training import SavedCheckpoint, saved_states


def export_checkpoint(
    path: Path,
    out: Path,
    *,
    part: str = "online",
    dtype: str | None = None,
    base: Path | None = None,
    merged: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the model of a training state in its published layout, or its adapter in that of PEFT.

    Args:
        path: the training state, or the output_dir of a run, which stands for its newest one. With `merged` also the
            directory of an adapter.
        out: directory to create.
        part: "online", the trained weights, or "target", those of the EMA target encoder with the trained head.
        dtype: "fp32" or "bf16"; None takes what the run would have exported, of an adapter's directory the type of the
            base. Adapters stay as they are.
        base: published directory that config.json and tokenizer files are copied from; adapters stand on its weights.
            None takes the one that the run started from, or that the adapter names.
        merged: of adapters, write their base with them merged into it.
        shard_bytes: largest size of a weight file in bytes.

    Raises:
        CheckpointError: if the training state or adapter is damaged, has no such part, stands on another base, or `out`
            exists.
    """
    if out.exists():
        raise CheckpointError(f"{out} already exists; nothing is overwritten: choose another directory or remove it")
    if is_adapter_directory(path):
        _export_adapter(path, out, part, dtype, base, merged, shard_bytes)
        return
    states = saved_states(path)
    if not states and (path / "metrics.jsonl").exists():
        raise CheckpointError(f"{path} is a run without training states (checkpoint.every_n_steps): nothing to export")
    checkpoint = SavedCheckpoint(states[-1] if states else path)
    checkpoint.verify()
    config, saved = OmegaConf.load(checkpoint.config), SavedModel(checkpoint, part, base)
    model = saved.model
    if saved.base is not None and not saved.base.is_dir():
        what = f"--base {base}" if base else f"the run started from {saved.base}, which"
        raise CheckpointError(
            f"{what} is not a directory here; give the one to copy config.json and the tokenizer from by --base"
        )
    if merged and model.lora is None:
        raise CheckpointError(f"{path} is of full fine-tuning: there is no adapter to merge; leave out --merged")
    stored = DTYPES[dtype or config.export_dtype or config.compute_dtype]
    weights = saved.weights(stored)
    files: dict[str, Any] = {
        "tokenizer": saved.tokenizer() if saved.base is None else None,
        "card": model_card(part, checkpoint.state, checkpoint.config.read_text(encoding="utf-8")),
        "prompt": saved.prompt(),
    }
    if model.lora is None:
        bar = tqdm(weights, total=len(model.state_dict()), desc="exporting", unit=" tensors", disable=None)
        save_hf(model, out, saved.base, stored, weights=bar, shard_bytes=shard_bytes, **files)
        return
    read, adapters = saved.base_weights().read, dict(weights)
    if merged:
        save_merged(model, out, read, adapters, like=saved.base, dtype=stored, shard_bytes=shard_bytes, **files)
    else:
        save_adapter(model, out, adapters, base=saved.base, **files)


def _export_adapter(
    path: Path, out: Path, part: str, dtype: str | None, base: Path | None, merged: bool, shard_bytes: int
) -> None:
    """Write the base of an adapter's directory with the adapter merged into it."""
    if part != "online":
        raise CheckpointError(f"{path} is an adapter, and only training states have a part {part!r}: leave out --part")
    if not merged:
        raise CheckpointError(f"{path} is an adapter already: add --merged to write its base with it merged")
    adapter = OpenedAdapter.open(path, base)
    card = path / "README.md"
    save_hf(
        adapter.base.build(),
        out,
        adapter.base.path,
        adapter.base.read("backbone.norm.scale").dtype if dtype is None else DTYPES[dtype],
        weights=adapter.merged(),
        card=card.read_text(encoding="utf-8") if card.exists() else None,
        prompt=read_prompt(path),
        shard_bytes=shard_bytes,
    )
