"""Any model on disk, opened by its directory: a Hugging Face directory, an adapter, or a training state."""

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from dllm_jepa.config import Component
from dllm_jepa.errors import CheckpointError
from dllm_jepa.models import (
    FAMILIES,
    HFCheckpoint,
    InitialWeights,
    LoRASettings,
    MaskedDiffusionLM,
    OpenedAdapter,
    Prompt,
    Tokenizer,
    TransformerSizes,
    add_lora,
    check_prompt,
    find_tokenizer,
    init_rope,
    is_adapter_directory,
    load_hf,
    merged_weights,
    read_prompt,
    tokenizer_builder,
)
from dllm_jepa.training import MANIFEST_NAME, Ranks, SavedCheckpoint, check_trained, saved_states, trained_tensors


@dataclass(frozen=True)
class ModelSource:
    """A model on disk, opened and checked, its weights not loaded.

    Args:
        path: its directory.
        model: the model on the meta device.
        tokenizer_dir: directory with its tokenizer files; None for a model that was trained with a built-in tokenizer.
        fingerprint: a checksum that differs where weights do.
        own_tokenizer: makes its own tokenizer.
        load: loads it into one process, in evaluation mode, from a type and a device.
        prompt: how it was prompted in training, if its directory says so: `template` and `system_prompt`.
    """

    path: Path
    model: MaskedDiffusionLM
    tokenizer_dir: Path | None
    fingerprint: str
    own_tokenizer: Callable[[], Tokenizer]
    load: Callable[[torch.dtype, torch.device], MaskedDiffusionLM]
    prompt: Prompt | None

    def tokenizer(self, component: Component | None = None) -> Tokenizer:
        """A tokenizer for it, checked by `check_ids`.

        Args:
            component: builder and arguments, which gets `tokenizer_dir` unless it has a `path`; None is its own.
        """
        if component is None:
            tokenizer = self.own_tokenizer()
        else:
            tokenizer = component.build(*([] if "path" in component.arguments else [self.tokenizer_dir]))
        self.check_ids(tokenizer)
        return tokenizer

    def check_ids(self, tokenizer: Tokenizer) -> None:
        """Refuse, with a CheckpointError, a tokenizer with ids that the model does not score."""
        num_ids = self.model.sizes.vocab_size
        if tokenizer.vocab_size > num_ids:
            raise CheckpointError(
                f"{self.path} scores {num_ids} ids, but the tokenizer has ids up to {tokenizer.vocab_size - 1}: give "
                "the tokenizer of the model"
            )


def open_model(
    path: str | Path, *, part: str = "online", base: str | Path | None = None, ranks: Ranks | None = None
) -> ModelSource:
    """Open a model of whatever kind.

    Args:
        path: a Hugging Face directory, an adapter (it names its base), or a training state.
        part: of a training state, "online" or "target": the weights of the EMA target encoder with the trained head.
        base: of adapters (also those of a training state), directory of their base; None takes the recorded one.
        ranks: ranks that share the work of verifying a training state; all of them call this.

    Raises:
        CheckpointError: if it is none of these, is damaged, has no such part or no adapters, or `base` is not the base
            that they were trained on.
    """
    path = Path(path)
    if (path / MANIFEST_NAME).is_file():
        return _open_training_state(path, part, base, ranks)
    if part != "online":
        raise CheckpointError(f"{path} is no training state, and only these have a part {part!r}: leave out part")
    if is_adapter_directory(path):
        return _open_adapter(path, base)
    if base is not None:
        raise CheckpointError(f"{path} is no adapter, and only adapters stand on a base: leave out the base {base}")
    if path.is_dir() and not (path / "config.json").exists() and (inside := _models_inside(path)):
        raise CheckpointError(f"{path} is the folder of a run: give one of the models in it: {', '.join(inside)}")
    return _open_hf(path)


def _open_hf(path: Path) -> ModelSource:
    checkpoint = HFCheckpoint(path)
    model = checkpoint.build()
    checkpoint.check(model)
    return ModelSource(
        path,
        model,
        path,
        checkpoint.fingerprint(),
        own_tokenizer=lambda: _directory_tokenizer(path, checkpoint.family),
        load=lambda dtype, device: load_hf(path, dtype, device),
        prompt=read_prompt(path),
    )


def _open_adapter(path: Path, base: str | Path | None) -> ModelSource:
    adapter = OpenedAdapter.open(path, base)
    return replace(
        _open_hf(adapter.base.path),
        path=path,
        fingerprint=adapter.fingerprint(),
        load=lambda dtype, device: _filled(adapter.base.build(), adapter.merged(), dtype, device),
        prompt=read_prompt(path),
    )


def _models_inside(run: Path) -> list[str]:
    """Models that a run has left, the newest training state last."""
    exports = [run / name for name in ("hf", "hf_target", "adapter", "adapter_target")]
    return [str(path) for path in (*exports, *saved_states(run)[-1:]) if path.is_dir()]


def _directory_tokenizer(path: Path, family: str) -> Tokenizer:
    function = find_tokenizer(tokenizer_builder(path) or "") or find_tokenizer(FAMILIES[family].tokenizer)
    assert function is not None, family
    return function(path)


def _open_training_state(path: Path, part: str, base: str | Path | None, ranks: Ranks | None) -> ModelSource:
    checkpoint = SavedCheckpoint(path)
    checkpoint.verify(ranks)
    model = saved_model(checkpoint, part)
    if base is not None and model.lora is None:
        raise CheckpointError(f"{path} is of full fine-tuning, and only adapters stand on a base: leave out {base}")
    base = saved_base(checkpoint, base)
    read = None if model.lora is None else base_weights(model, checkpoint.state, base).read
    with torch.device("meta"):
        plain = FAMILIES[model.family].build(model.sizes)

    def load(dtype: torch.dtype, device: torch.device) -> MaskedDiffusionLM:
        weights = saved_weights(checkpoint, model, part, dtype)
        if read is not None and model.lora is not None:
            weights = merged_weights(plain.state_dict(), read, dict(weights), model.lora)
        return _filled(copy.deepcopy(plain), weights, dtype, device)

    digest = hashlib.sha256((checkpoint.path / MANIFEST_NAME).read_bytes()).hexdigest()
    return ModelSource(
        path,
        plain,
        base,
        f"{digest} {part}",
        own_tokenizer=lambda: saved_tokenizer(checkpoint, base),
        load=load,
        prompt=saved_prompt(checkpoint),
    )


def _filled(
    model: MaskedDiffusionLM, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, device: torch.device
) -> MaskedDiffusionLM:
    """A model of the meta device with memory and weights, which are taken one at a time."""
    model = model.to(dtype).to_empty(device=device)
    init_rope(model)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights:
            params[name].copy_(weight)
    return model.eval()


def saved_model(checkpoint: SavedCheckpoint, part: str) -> MaskedDiffusionLM:
    """The model of a training state, with its adapters, on the meta device and held against the saved tensors.

    Args:
        checkpoint: the training state.
        part: "online" or "target", the weights that will be read.

    Raises:
        CheckpointError: if its family is not one of this package, its tensors do not fit, or it has no such part.
    """
    saved: dict[str, Any] = checkpoint.state["model"]
    if saved["family"] not in FAMILIES:
        raise CheckpointError(
            f"the checkpoint is of the family {saved['family']!r}; known: {', '.join(sorted(FAMILIES))}. A family of "
            "your own is exported by its recipe: resume=CHECKPOINT with as many max_steps as the checkpoint has"
        )
    with torch.device("meta"):
        model = FAMILIES[saved["family"]].build(TransformerSizes(**saved["sizes"]))
        if saved.get("lora") is not None:
            model = add_lora(model, LoRASettings(**saved["lora"]))
    check_trained(checkpoint, "model", model)
    if part == "target" and not any(name.startswith("target.") for name in checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.path} has no target encoder: its run had jepa_weight: 0. Take the part online"
        )
    return model


def saved_base(checkpoint: SavedCheckpoint, given: str | Path | None) -> Path | None:
    """The directory of the base: the given one, or that which the run started from; None for random weights."""
    base = given or checkpoint.state["base"]
    return None if base is None else Path(base)


def saved_prompt(checkpoint: SavedCheckpoint) -> Prompt | None:
    """How the run of a training state prompts its model; None if the state does not say so."""
    return check_prompt(checkpoint.state.get("prompt"), checkpoint.path / "state.json")


def base_weights(model: MaskedDiffusionLM, state: dict[str, Any], base: Path | None) -> HFCheckpoint | InitialWeights:
    """The weights that the adapters of a training state stand on.

    Args:
        model: the model with its adapters.
        state: what the training state says of its run.
        base: directory of the base; None for random weights.

    Raises:
        CheckpointError: if the directory does not fit the model, or holds other weights than the run started from.
    """
    if base is None:
        return InitialWeights(model, seed=state["seed"])
    checkpoint = HFCheckpoint(base)
    checkpoint.check(model)
    if checkpoint.fingerprint() != state["base_weights"]:
        raise CheckpointError(
            f"the adapters were trained on other weights than those of {base}; give the directory of their base, which "
            f"was {state['base']} (base=DIRECTORY in Python, adapter_base=DIRECTORY in a config, --base DIRECTORY of "
            "dllm-jepa export)"
        )
    return checkpoint


def saved_weights(
    checkpoint: SavedCheckpoint, model: MaskedDiffusionLM, part: str, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The trained tensors of a model; of a target encoder the averages, beside what has none.

    Args:
        checkpoint: the training state.
        model: its model.
        part: "online" or "target".
        dtype: type of the tensors, save adapters, which are fp32.

    Yields:
        Parameter names of the model, and tensors on the CPU.
    """
    for name in trained_tensors(model):
        average = f"target.{name if model.lora is not None else name.removeprefix('backbone.')}"
        is_average = part == "target" and average in checkpoint.tensors
        saved = average if is_average else f"trained.model.{name}"
        yield name, checkpoint.read(saved, dtype if model.lora is None else torch.float32)


def saved_tokenizer(checkpoint: SavedCheckpoint, base: Path | None) -> Tokenizer:
    """The tokenizer of the run that saved a training state.

    Args:
        checkpoint: the training state.
        base: where the directory that the run started from is now; a tokenizer that was read from there is read here.

    Raises:
        CheckpointError: if it is not of this package.
    """
    config: Any = OmegaConf.load(checkpoint.config)
    arguments = {str(key): value for key, value in config.tokenizer.items()}
    path = str(arguments.pop("_component_"))
    if base is not None and arguments.get("path") == checkpoint.state["base"]:
        arguments["path"] = base
    function = find_tokenizer(path)
    if function is None:
        raise CheckpointError(
            f"the run's tokenizer {path} is not of this package, and code that a checkpoint names is not run; give a "
            "directory with its files and config.json by --base of dllm-jepa export"
        )
    return function(**arguments)
