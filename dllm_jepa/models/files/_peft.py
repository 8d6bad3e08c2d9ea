"""Adapters in the layout of the PEFT library, which loads them on the published class.

Source: https://github.com/huggingface/peft (names of the tensors and keys of adapter_config.json).
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models._families import FAMILIES
from dllm_jepa.models._lora import adapted_modules, add_lora, is_adapter
from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM
from dllm_jepa.models._sizes import ATTN_MODULES, MLP_MODULES, LoRASettings
from dllm_jepa.models._tokenizer import Tokenizer
from dllm_jepa.models.files._directory import Prompt, export_directory, read_json_object, write_json, write_tensors
from dllm_jepa.models.files._merge import merged_weights
from dllm_jepa.models.files._reader import ADAPTER_CONFIG_NAME, HFCheckpoint, load_hf

_WEIGHTS_NAME = "adapter_model.safetensors"
_BASE_KEY = "dllm_jepa.base_fingerprint"  # in the metadata of the weights, which PEFT passes over
_PREFIX = "base_model.model."
_SUFFIXES = {
    ".lora_a.weight": ".lora_A.weight",
    ".lora_b.weight": ".lora_B.weight",
    ".magnitude": ".lora_magnitude_vector",
}
# Values of adapter_config.json under which the product B A means what it means here. Other features of PEFT either add
# tensors, which are refused by name, or change only how an adapter is trained.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, True, None),
    "use_rslora": (False, None),
    "use_qalora": (False, None),
    "alpha_pattern": ({}, None),
    "rank_pattern": ({}, None),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    # The others (PiSSA, OLoRA, LoftQ, CorDA) change the weights of the base, too.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def save_adapter(
    model: MaskedDiffusionLM,
    path: str | Path,
    adapters: Mapping[str, Tensor],
    *,
    base: str | Path | None,
    tokenizer: Tokenizer | None = None,
    card: str | None = None,
    prompt: Prompt | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors; the directory appears complete or not at all.

    Args:
        model: a model with adapters, on any device; it gives the family, the sizes and the settings.
        path: directory to create.
        adapters: full tensors, by our parameter names.
        base: directory of the base, whose absolute path and fingerprint are stored; None for random weights.
        tokenizer: its files are written if there is no base, whose directory has them otherwise.
        card: see `save_hf`.
        prompt: see `save_hf`.

    Raises:
        CheckpointError: if `path` exists or cannot be written.
    """
    assert model.lora is not None, "the model has no adapters"
    fingerprint = "" if base is None else HFCheckpoint(base).fingerprint()
    names = _peft_names(model)
    tensors = {names[name]: tensor.detach().to("cpu").contiguous() for name, tensor in adapters.items()}
    with export_directory(Path(path), card, prompt) as directory:
        write_tensors(directory / _WEIGHTS_NAME, tensors, {_BASE_KEY: fingerprint})
        write_json(directory / ADAPTER_CONFIG_NAME, _peft_config(model, base))
        if tokenizer is not None and base is None:
            tokenizer.save(directory)


def load_adapter(
    path: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MaskedDiffusionLM:
    """Load a base and an adapter, of this package or of PEFT, into one process.

    Args:
        path: directory of the adapter.
        base: directory of the base; None takes the one that the adapter names.
        dtype: type of the weights of the base; adapters stay in theirs.
        device: where they go.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: if a directory cannot be read, the adapter was trained on another base, uses a feature of PEFT
            that is not supported, or its tensors do not fit its config.
    """
    adapter = OpenedAdapter.open(path, base)
    model = add_lora(load_hf(adapter.base.path, dtype, device), adapter.settings)
    model.load_state_dict(dict(adapter.tensors), strict=False)
    return model.eval()


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter and its base, checked; the adapter is in main memory, of the base nothing is read.

    Args:
        base: the base.
        settings: what the adapters are like.
        tensors: the adapters, by our parameter names.
    """

    base: HFCheckpoint
    settings: LoRASettings
    tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, path: str | Path, base: str | Path | None = None) -> "OpenedAdapter":
        """Open the directory of an adapter; arguments and errors as of `load_adapter`."""
        path = Path(path)
        config = _read_config(path / ADAPTER_CONFIG_NAME)
        checkpoint = HFCheckpoint(_named_base(path, config) if base is None else base)
        checkpoint.check(checkpoint.build())
        fingerprint, saved = _read_tensors(path / _WEIGHTS_NAME)
        if fingerprint is not None and fingerprint != checkpoint.fingerprint():
            raise CheckpointError(
                f"the adapter {path} was trained on other weights than those of {checkpoint.path}: give the directory "
                "of its base"
            )
        published = FAMILIES[checkpoint.family].hf_names(checkpoint.sizes)
        settings = _settings(path / ADAPTER_CONFIG_NAME, config, saved, published)
        model = add_lora(checkpoint.build(), settings)
        _check_shapes(path / _WEIGHTS_NAME, model, saved)
        return cls(checkpoint, settings, {name: saved[theirs] for name, theirs in _peft_names(model).items()})

    def fingerprint(self) -> str:
        """A sha256 of the adapter, its settings and the fingerprint of its base."""
        digest = hashlib.sha256(f"{self.base.fingerprint()} {self.settings}".encode())
        for name in sorted(self.tensors):
            digest.update(f"{name} {self.tensors[name].dtype}".encode())
            digest.update(self.tensors[name].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of the plain model that computes the same, one at a time; see `merged_weights`."""
        return merged_weights(self.base.build().state_dict(), self.base.read, self.tensors, self.settings)


def is_adapter_directory(path: str | Path) -> bool:
    """Whether a directory holds an adapter in the layout of PEFT, and no whole model besides."""
    return (Path(path) / ADAPTER_CONFIG_NAME).is_file() and not (Path(path) / "config.json").exists()


def _read_config(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise CheckpointError(f"{file.parent} is no adapter: it has no {file.name}")
    config = read_json_object(file)
    for key, allowed in _SUPPORTED.items():
        if key in config and config[key] not in allowed:
            raise CheckpointError(f"{file}: {key} is {config[key]!r}; supported is {allowed[0]!r}")
    return config


def _named_base(path: Path, config: Mapping[str, Any]) -> Path:
    """The directory of the base that an adapter names, by its path or by its name on the hub."""
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{path / ADAPTER_CONFIG_NAME} names no base. An adapter trained on random weights, which were not stored, "
            "has none: have the run write the merged model (export_merged=true)"
        )
    if not Path(base).is_dir():
        raise CheckpointError(
            f"the adapter {path} names the base {base}, and there is no such directory: download the base, or give its "
            "directory (base=DIRECTORY in Python, adapter_base=DIRECTORY in a config, --base DIRECTORY of dllm-jepa "
            "export)"
        )
    return Path(base)


def _read_tensors(file: Path) -> tuple[str | None, dict[str, Tensor]]:
    """The fingerprint of the base ("" for random weights, None if another tool wrote the file), and the adapters."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if bad := [name for name, value in tensors.items() if not value.is_floating_point() or not value.isfinite().all()]:
        raise CheckpointError(f"{file} holds values that are not finite numbers in {bad[0]}")
    return metadata.get(_BASE_KEY), tensors


def _settings(
    file: Path, config: Mapping[str, Any], saved: Mapping[str, Tensor], published: Mapping[str, str]
) -> LoRASettings:
    """The settings of an adapter: the modules from the names of its tensors, everything else from its config."""
    modules = {
        ours.removesuffix(".weight").split(".", 3)[-1]
        for ours, theirs in published.items()
        if f"{_PREFIX}{theirs.removesuffix('.weight')}.lora_A.weight" in saved
    }
    try:
        if type(config["r"]) is not int:
            raise TypeError(f"r must be a whole number, got {config['r']!r}")
        return LoRASettings(
            attn_modules=[name for name in ATTN_MODULES if f"attn.{name}" in modules],
            apply_to_mlp=any(f"mlp.{name}" in modules for name in MLP_MODULES),
            rank=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            use_dora=bool(config.get("use_dora")),
        )
    except KeyError as error:
        raise CheckpointError(f"{file} has no key {error.args[0]!r}") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file} has unusable settings: {error}") from None


def _check_shapes(file: Path, model: MaskedDiffusionLM, saved: Mapping[str, Tensor]) -> None:
    names = _peft_names(model)
    expected = {names[name]: tuple(p.shape) for name, p in model.named_parameters() if is_adapter(name)}
    found = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        lines = [f"{name}: {found.get(name, 'missing')}, needed {expected.get(name, 'nothing')}" for name in wrong[:10]]
        raise CheckpointError(f"{file} does not fit its settings:\n  " + "\n  ".join(lines))


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
        "base_model_name_or_path": None if base is None else str(Path(base).absolute()),
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
