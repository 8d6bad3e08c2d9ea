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
from dllm_jepa.data import is_row_file
from dllm_jepa.errors import UserError
from dllm_jepa.models import HFCheckpoint, MaskedDiffusionLM
from dllm_jepa.trained_model import open_model
from dllm_jepa.training import MANIFEST_NAME

_NUM_ROWS = 8
_BYTES = {"fp32": 4, "bf16": 2}

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
    """The first rows of the data have to make sequences.

    Not tried: a builder that takes no `max_rows`, and a dataset of the hub, which would be fetched as a whole.
    """
    source = dataset.arguments.get("source")
    if not dataset.takes("max_rows") or (isinstance(source, str) and not is_row_file(source)):
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
    output_dir: str,
    resume: str,
    checkpoint: Checkpoint,
    model: Component,
    dtype: str,
    compute_dtype: str,
    export_dtype: str | None,
    export: str | None,
) -> Iterator[str]:
    """A new run's exports must fit, and its first training state, of which the weights alone are counted."""
    if resume != "never":  # what it goes on from may have written them already
        return
    built = _model(model)
    trained = sum(param.numel() for param in built.parameters() if param.requires_grad)
    weights = trained if built.lora is not None else sum(param.numel() for param in built.parameters())
    num_exports = {None: 0, "both": 2}.get(export, 1)
    needs = {("output_dir", output_dir): num_exports * weights * _BYTES[export_dtype or compute_dtype]}
    if checkpoint.every_n_steps is not None:
        at = ("checkpoint.directory", checkpoint.directory) if checkpoint.directory else ("output_dir", output_dir)
        needs[at] = needs.get(at, 0) + trained * _BYTES[dtype]
    for (key, value), needed in needs.items():
        path = Path(value).absolute()
        folder = next(parent for parent in (path, *path.parents) if parent.is_dir())
        free = shutil.disk_usage(folder).free
        if needed > free:
            yield (
                f"{key}: {folder} has {free / 2**20:,.0f} MiB free, and what the run writes there takes at least "
                f"{needed / 2**20:,.0f} MiB; free some, or choose a folder on another disk"
            )


def trained_model_opens(checkpoint_dir: str, part: str, adapter_base: str | None) -> Iterator[str]:
    """The model has to be one; a training state is verified when it is used, since that reads all of it."""
    path = Path(checkpoint_dir)
    try:
        if not (path / MANIFEST_NAME).is_file():
            open_model(path, part=part, base=adapter_base)
    except UserError as error:
        yield f"checkpoint_dir: {error}"


def files_of_task_exist(task: Component) -> Iterator[str]:
    """The files and folders that a task reads must be there; names of the hub are looked up when it starts."""
    for name in ("source", "shots_source", "tables", "databases"):
        value = task.arguments.get(name)
        if not isinstance(value, str) or Path(value).exists():
            continue
        if name in ("tables", "databases") or is_row_file(value):
            yield f"task.{name}: {value!r} does not exist (looked for {Path(value).absolute()})"


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
