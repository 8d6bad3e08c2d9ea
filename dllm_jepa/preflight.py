"""What can be opened before a run starts: checkpoint, tokenizer, first rows of the data, disk, packages of the logger.

Rules on configs (see `config.Rule`) that a recipe lists under `opens`: `dllm-jepa validate` and every start call them,
so that nothing that could be known is found after hours of tokenizing or training.
"""

import functools
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dllm_jepa.config import Checkpoint, Component
from dllm_jepa.errors import UserError
from dllm_jepa.models import HFCheckpoint, MaskedDiffusionLM

_NUM_ROWS = 8

# What torchtune's loggers import when they are made.
_PACKAGES = {
    "WandBLogger": "wandb",
    "TensorBoardLogger": "tensorboard",
    "CometLogger": "comet_ml",
    "MLFlowLogger": "mlflow",
}


def model_opens(model: Component, tokenizer: Component, checkpoint_dir: str | None, max_seq_len: int) -> Iterator[str]:
    """Tokenizer, model and checkpoint have to fit each other."""
    try:
        tokens = _tokenizer(tokenizer)
    except UserError as error:
        yield f"tokenizer: {error}"
        return
    try:
        built = _model(model)
        built.check_fits(vocab_size=tokens.vocab_size, max_seq_len=max_seq_len)
        if checkpoint_dir is not None:
            HFCheckpoint(checkpoint_dir).check(built, mask_id=tokens.mask_id)
    except UserError as error:
        yield str(error)


def data_opens(dataset: Component, tokenizer: Component, model: Component, max_seq_len: int) -> Iterator[str]:
    """The first rows of the data have to make sequences; a builder that takes no `max_rows` is not tried."""
    if not dataset.takes("max_rows"):
        return
    try:
        given = {"tokenizer": _tokenizer(tokenizer), "shift_logits": _model(model).shift_logits}
    except UserError:  # `model_opens` says it
        return
    try:
        dataset.build(**given, max_seq_len=max_seq_len, max_rows=_NUM_ROWS, progress=False)
    except (UserError, ValueError) as error:  # the second: a builder's word on its arguments
        yield f"dataset: {error}"


def disk_has_room(
    output_dir: str, checkpoint: Checkpoint, model: Component, compute_dtype: str, export: str | None
) -> Iterator[str]:
    """The export must fit, and beside it one training state, of which the weights alone are counted."""
    built = _model(model)
    trained = sum(param.numel() for param in built.parameters() if param.requires_grad)
    exported = trained if built.lora is not None else sum(param.numel() for param in built.parameters())
    export_bytes = 0 if export is None else exported * (2 if compute_dtype == "bf16" else 4)
    needs: dict[tuple[str, str], int] = {("output_dir", output_dir): export_bytes}
    state_at = ("checkpoint.directory", checkpoint.directory) if checkpoint.directory else ("output_dir", output_dir)
    needs[state_at] = needs.get(state_at, 0) + 4 * trained
    for (key, value), needed in needs.items():
        path = Path(value).absolute()
        folder = next(parent for parent in (path, *path.parents) if parent.is_dir())
        free = shutil.disk_usage(folder).free
        if needed > free:
            yield (
                f"{key}: {folder} has {free / 2**20:,.0f} MiB free, and what the run writes there takes at least "
                f"{needed / 2**20:,.0f} MiB; free some, or choose a folder on another disk"
            )


def logger_is_installed(metric_logger: Component | None) -> Iterator[str]:
    """The package that a logger of torchtune writes with has to be there."""
    package = None if metric_logger is None else _PACKAGES.get(metric_logger.path.rpartition(".")[2])
    if metric_logger is not None and package is not None and importlib.util.find_spec(package) is None:
        yield (
            f"metric_logger: {metric_logger.path} needs the package {package}, which is not installed; install it "
            f"(pip install {package.replace('_', '-')}), or set metric_logger: null"
        )


@functools.lru_cache(maxsize=1)
def _tokenizer(tokenizer: Component) -> Any:
    return tokenizer.build()


@functools.lru_cache(maxsize=1)
def _model(model: Component) -> MaskedDiffusionLM:
    with torch.device("meta"):
        built: MaskedDiffusionLM = model.build()
    return built
