"""Adapters in the layout of the PEFT library, which loads them on the published class.

Source: https://github.com/huggingface/peft (names of the tensors and keys of adapter_config.json).
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models._export_directory import export_directory
from dllm_jepa.models._families import FAMILIES
from dllm_jepa.models._hf_reader import HFCheckpoint, load_hf
from dllm_jepa.models._json import read_json_object
from dllm_jepa.models._lora import LoRASettings, adapted_modules, add_lora, is_adapter
from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM
from dllm_jepa.models._merge import merged_weights
from dllm_jepa.models._tokenizer import Tokenizer

CONFIG_NAME = "adapter_config.json"
_WEIGHTS_NAME = "adapter_model.safetensors"
_BASE_KEY = "dllm_jepa.base_fingerprint"  # in the metadata of the weights, which PEFT passes over
_SETTINGS_KEY = "dllm_jepa.lora"
_PREFIX = "base_model.model."
_SUFFIXES = {
    ".lora_a.weight": ".lora_A.weight",
    ".lora_b.weight": ".lora_B.weight",
    ".magnitude": ".lora_magnitude_vector",
}


def save_adapter(
    model: MaskedDiffusionLM,
    path: str | Path,
    adapters: Mapping[str, Tensor],
    *,
    base: str | Path | None,
    tokenizer: Tokenizer | None = None,
    card: str | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors; the directory appears complete or not at all.

    Args:
        model: a model with adapters, on any device; it gives the family, the sizes and the settings.
        path: directory to create.
        adapters: full tensors, by our parameter names.
        base: directory of the base, whose fingerprint is stored; None for a base with random weights.
        tokenizer: its files are written if there is no base, whose directory has them otherwise.
        card: text of README.md; None writes none.

    Raises:
        CheckpointError: if `path` exists or cannot be written.
    """
    assert model.lora is not None, "the model has no adapters"
    metadata = {"format": "pt", _SETTINGS_KEY: json.dumps(asdict(model.lora))}
    metadata |= {} if base is None else {_BASE_KEY: HFCheckpoint(base).fingerprint()}
    names = _peft_names(model)
    tensors = {names[name]: tensor.detach().to("cpu").contiguous() for name, tensor in adapters.items()}
    with export_directory(Path(path), card) as directory:
        save_file(tensors, directory / _WEIGHTS_NAME, metadata=metadata)
        config = json.dumps(_peft_config(model, base), indent=2) + "\n"
        (directory / CONFIG_NAME).write_text(config, encoding="utf-8")
        if tokenizer is not None and base is None:
            tokenizer.save(directory)


def load_adapter(
    path: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MaskedDiffusionLM:
    """Load a base and an adapter that was written by `save_adapter` into one process.

    Args:
        path: directory of the adapter.
        base: directory of the base; None takes the one that the adapter names.
        dtype: type of the weights of the base; adapters stay in theirs.
        device: where they go.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: if a directory cannot be read, the adapter was trained on another base, or its tensors do not
            fit its config.
    """
    adapter = OpenedAdapter.open(path, base)
    model = add_lora(load_hf(adapter.origin.path, dtype, device), adapter.settings)
    model.load_state_dict(dict(adapter.tensors), strict=False)
    return model.eval()


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter and its base, checked; the adapter is in main memory, of the base nothing is read.

    Args:
        origin: the base.
        settings: what the adapters are like.
        tensors: the adapters, by our parameter names.
    """

    origin: HFCheckpoint
    settings: LoRASettings
    tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, path: str | Path, base: str | Path | None = None) -> "OpenedAdapter":
        """Open a directory that was written by `save_adapter`; arguments and errors as of `load_adapter`."""
        path, config = Path(path), read_adapter_config(path)
        origin = HFCheckpoint(base or adapter_base(path))
        origin.check(origin.build())
        metadata, saved = _read(path / _WEIGHTS_NAME)
        if metadata.get(_BASE_KEY) != origin.fingerprint():
            raise CheckpointError(
                f"the adapter {path} was trained on other weights than those of {origin.path}: give the directory of "
                "its base"
            )
        settings = _settings(path, metadata, config)
        names = _check_shapes(path / _WEIGHTS_NAME, add_lora(origin.build(), settings), saved)
        return cls(origin, settings, {name: saved[theirs] for name, theirs in names.items()})

    def fingerprint(self) -> str:
        """What tells it and its base from others."""
        digest = hashlib.sha256(f"{self.origin.fingerprint()} {self.settings}".encode())
        for name in sorted(self.tensors):
            digest.update(f"{name} {self.tensors[name].dtype}".encode())
            digest.update(self.tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of the plain model that computes the same, one at a time; see `merged_weights`."""
        return merged_weights(self.origin.build().state_dict(), self.origin.read, self.tensors, self.settings)


def read_adapter_config(path: str | Path) -> dict[str, Any]:
    """The adapter_config.json of a directory.

    Raises:
        CheckpointError: if there is none.
    """
    file = Path(path) / CONFIG_NAME
    if not file.exists():
        raise CheckpointError(f"{path} is no adapter: it has no {CONFIG_NAME}")
    return read_json_object(file)


def adapter_base(path: str | Path) -> Path:
    """The directory of the base that an adapter names.

    Raises:
        CheckpointError: if it is no adapter, or names none.
    """
    base = read_adapter_config(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{Path(path) / CONFIG_NAME} names no base: it was trained on random weights, which were not stored. "
            "Export the merged model instead: export_merged=true, or dllm-jepa export --merged"
        )
    return Path(base)


def is_adapter_directory(path: str | Path) -> bool:
    """Whether a directory holds an adapter in the layout of PEFT."""
    return (Path(path) / CONFIG_NAME).is_file()


def _check_shapes(file: Path, model: MaskedDiffusionLM, saved: Mapping[str, Tensor]) -> dict[str, str]:
    """Hold the tensors of a file against a model on the meta device; returns their names, by ours."""
    names = _peft_names(model)
    expected = {names[name]: tuple(p.shape) for name, p in model.named_parameters() if is_adapter(name)}
    found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        lines = [f"{name}: {found.get(name, 'missing')}, needed {expected.get(name, 'nothing')}" for name in wrong[:10]]
        raise CheckpointError(f"{file} does not fit its settings:\n  " + "\n  ".join(lines))
    return names


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if _SETTINGS_KEY not in metadata:
        raise CheckpointError(f"{file} was not written by this package: it lacks the settings of its adapters")
    if bad := [name for name, value in tensors.items() if not value.is_floating_point() or not value.isfinite().all()]:
        raise CheckpointError(f"{file} holds values that are not finite numbers in {bad[0]}")
    return metadata, tensors


def _settings(path: Path, metadata: Mapping[str, str], config: Mapping[str, Any]) -> LoRASettings:
    """The settings of the adapters, which both files have; the base is read as it was published, never quantized."""
    try:
        saved = json.loads(metadata[_SETTINGS_KEY])
        settings = LoRASettings(**saved | {"quantize_base": False})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path / _WEIGHTS_NAME} has unusable settings of its adapters: {error}") from None
    stated = [config.get(key) for key in ("r", "lora_alpha", "use_dora")]
    if stated != [settings.rank, settings.alpha, settings.use_dora] or not isinstance(settings.rank, int):
        raise CheckpointError(
            f"{path / CONFIG_NAME} has r, lora_alpha and use_dora {stated}, the adapters were trained with "
            f"{[settings.rank, settings.alpha, settings.use_dora]}: one of the two files was changed"
        )
    return settings


def _peft_names(model: MaskedDiffusionLM) -> dict[str, str]:
    """PEFT's name of every adapter tensor, by ours."""
    assert model.lora is not None, "the model has no adapters"
    published = FAMILIES[model.family].hf_names(model.sizes)
    suffixes = {ours: theirs for ours, theirs in _SUFFIXES.items() if ours != ".magnitude" or model.lora.use_dora}
    return {
        f"{module}{ours}": f"{_PREFIX}{published[f'{module}.weight'].removesuffix('.weight')}{theirs}"
        for module in adapted_modules(model)
        for ours, theirs in suffixes.items()
    }


def _peft_config(model: MaskedDiffusionLM, base: str | Path | None) -> dict[str, Any]:
    assert model.lora is not None, "the model has no adapters"
    published = FAMILIES[model.family].hf_names(model.sizes)
    modules = {re.escape(published[f"{module}.weight"].removesuffix(".weight")) for module in adapted_modules(model)}
    layers = sorted({re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", module) for module in modules})
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None if base is None else str(base),
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "lora_dropout": model.lora.dropout,
        # A pattern of the whole path: LLaDA calls a layer of each block, and its head, ff_out.
        "target_modules": "|".join(layers),
        "use_dora": model.lora.use_dora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
