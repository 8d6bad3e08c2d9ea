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
    saved = SavedModel(checkpoint, part, base)
    model = saved.model
    if base is not None and model.lora is None:
        raise CheckpointError(f"{path} is of full fine-tuning, and only adapters stand on a base: leave out {base}")
    read = None if model.lora is None else saved.base_weights().read
    with torch.device("meta"):
        plain = FAMILIES[model.family].build(model.sizes)

    def load(dtype: torch.dtype, device: torch.device) -> MaskedDiffusionLM:
        weights = saved.weights(dtype)
        if read is not None and model.lora is not None:
            weights = merged_weights(plain.state_dict(), read, dict(weights), model.lora)
        return _filled(copy.deepcopy(plain), weights, dtype, device)

    digest = hashlib.sha256((checkpoint.path / MANIFEST_NAME).read_bytes()).hexdigest()
    return ModelSource(
        path,
        plain,
        saved.base,
        f"{digest} {part}",
        own_tokenizer=saved.tokenizer,
        load=load,
        prompt=saved.prompt(),
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


class SavedModel:
    """The model of a training state, its weights not loaded.

    Args:
        checkpoint: the training state, verified.
        part: "online" or "target": the averages of the EMA target encoder, beside what has none.
        base: where the directory that the run started from is now; None where the run found it.

    Attributes:
        model: with its adapters, on the meta device.
        base: directory that the run started from; None for random weights.

    Raises:
        CheckpointError: if its family is not one of this package, its tensors do not fit, or it has no such part.
    """

    def __init__(self, checkpoint: SavedCheckpoint, part: str, base: str | Path | None) -> None:
        """Build the model, and hold it against the saved tensors."""
        self._checkpoint, self._part = checkpoint, part
        base = base or checkpoint.state["base"]
        self.base = None if base is None else Path(base)
        saved: dict[str, Any] = checkpoint.state["model"]
        if saved["family"] not in FAMILIES:
            raise CheckpointError(
                f"the checkpoint is of the family {saved['family']!r}; known: {', '.join(sorted(FAMILIES))}. A family "
                "of your own is exported by its recipe: resume=CHECKPOINT with as many max_steps as the checkpoint has"
            )
        with torch.device("meta"):
            self.model = FAMILIES[saved["family"]].build(TransformerSizes(**saved["sizes"]))
            if saved.get("lora") is not None:
                self.model = add_lora(self.model, LoRASettings(**saved["lora"]))
        check_trained(checkpoint, "model", self.model)
        if part == "target" and not any(name.startswith("target.") for name in checkpoint.tensors):
            raise CheckpointError(
                f"{checkpoint.path} has no target encoder: its run had jepa_weight: 0. Take the part online"
            )

    def weights(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """The trained tensors by parameter name, on the CPU: of this type, or fp32 adapters."""
        lora = self.model.lora is not None
        for name in trained_tensors(self.model):
            average = f"target.{name if lora else name.removeprefix('backbone.')}"
            is_average = self._part == "target" and average in self._checkpoint.tensors
            saved = average if is_average else f"trained.model.{name}"
            yield name, self._checkpoint.read(saved, torch.float32 if lora else dtype)

    def base_weights(self) -> HFCheckpoint | InitialWeights:
        """The weights that the adapters stand on.

        Raises:
            CheckpointError: if `base` does not fit the model, or holds other weights than the run started from.
        """
        state = self._checkpoint.state
        if self.base is None:
            return InitialWeights(self.model, seed=state["seed"])
        checkpoint = HFCheckpoint(self.base)
        checkpoint.check(self.model)
        if checkpoint.fingerprint() != state["base_weights"]:
            raise CheckpointError(
                f"the adapters were trained on other weights than those of {self.base}; give the directory of their "
                f"base, which was {state['base']} (base=DIRECTORY in Python, adapter_base=DIRECTORY in a config, "
                "--base DIRECTORY of dllm-jepa export)"
            )
        return checkpoint

    def prompt(self) -> Prompt | None:
        """How the run prompts its model; None if the training state does not say so."""
        return check_prompt(self._checkpoint.state.get("prompt"), self._checkpoint.path / "state.json")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run, read from `base` if the run read it from there.

        Raises:
            CheckpointError: if it is not of this package.
        """
        config: Any = OmegaConf.load(self._checkpoint.config)
        arguments = {str(key): value for key, value in config.tokenizer.items()}
        path = str(arguments.pop("_component_"))
        if self.base is not None and arguments.get("path") == self._checkpoint.state["base"]:
            arguments["path"] = self.base
        function = find_tokenizer(path)
        if function is None:
            raise CheckpointError(
                f"the run's tokenizer {path} is not of this package, and code that a checkpoint names is not run; give "
                "a directory with its files and config.json by --base of dllm-jepa export"
            )
        return function(**arguments)
