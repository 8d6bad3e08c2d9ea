"""Reading a published checkpoint: config.json and safetensors, never code and never pickles."""

import hashlib
from collections.abc import Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models._families import FAMILIES
from dllm_jepa.models._layers import init_rope
from dllm_jepa.models._lora import is_adapter
from dllm_jepa.models._masked_diffusion_lm import MaskedDiffusionLM
from dllm_jepa.models._sizes import TransformerSizes
from dllm_jepa.models.files._directory import read_json_object

ADAPTER_CONFIG_NAME = "adapter_config.json"
INDEX_NAME = "model.safetensors.index.json"
_SINGLE_NAME = "model.safetensors"
_NUM_SAMPLED_ROWS = 16


class HFCheckpoint:
    """A directory with config.json and safetensors, opened but not loaded.

    Weights are read by our names, one tensor (or some of its rows) at a time, so that a rank of a sharded model reads
    no more than its own part.

    Args:
        path: the directory.

    Raises:
        CheckpointError: if the directory, its config.json or its weight files cannot be used.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            what = "is not a directory" if self.path.exists() else "does not exist"
            raise CheckpointError(f"checkpoint directory {self.path} {what}")
        if not (self.path / "config.json").exists():
            if (self.path / ADAPTER_CONFIG_NAME).exists():
                raise CheckpointError(
                    f"{self.path} is an adapter, without the weights of its base: merge the two by `dllm-jepa export "
                    f"{self.path} OUT --merged` and give OUT"
                )
            raise CheckpointError(f"checkpoint directory {self.path} has no config.json")
        self.config = read_json_object(self.path / "config.json")
        self.family, self.sizes = _read_architecture(self.path / "config.json", self.config)
        self._names = FAMILIES[self.family].hf_names(self.sizes)
        self._files = {file: _open(self.path / file) for file in self._weight_files()}
        self._file_of = {name: file for file, handle in self._files.items() for name in handle.keys()}  # noqa: SIM118

    def build(self) -> MaskedDiffusionLM:
        """The model on the meta device: shapes without memory."""
        with torch.device("meta"):
            return FAMILIES[self.family].build(self.sizes)

    def architecture_differences(self, model: MaskedDiffusionLM) -> list[str]:
        """What config.json and a model disagree on, one line each; empty when they compute the same function."""
        if model.family != self.family:
            return [
                f"its config.json has model_type {self.family!r}, the configured model is of family {model.family!r}"
            ]
        return [
            f"{key} is {getattr(self.sizes, key)} in config.json, {getattr(model.sizes, key)} in the configured model"
            for key in TransformerSizes.__dataclass_fields__
            # A shorter context only limits what may be fed in; everything else changes the function.
            if key != "max_seq_len" and getattr(self.sizes, key) != getattr(model.sizes, key)
        ]

    def check(self, model: MaskedDiffusionLM, *, mask_id: int | None = None) -> None:
        """Hold a model (on any device, before sharding) against the files.

        Args:
            model: the model to be filled.
            mask_id: mask token id of the tokenizer in use; None does not check it.

        Raises:
            CheckpointError: listing all differences in architecture, or all missing, unexpected and mis-shaped tensors.
        """
        problems = self.architecture_differences(model)
        if mask_id is not None and self.config.get("mask_token_id", mask_id) != mask_id:
            problems.append(
                f"mask_token_id is {self.config['mask_token_id']} in config.json, the tokenizer's mask token has id "
                f"{mask_id}: use the tokenizer of this checkpoint"
            )
        if not problems:
            base = {name: param for name, param in model.named_parameters() if not is_adapter(name)}
            shapes = {self._names[name]: list(param.shape) for name, param in base.items()}
            problems += [f"missing tensor {name} {shapes[name]}" for name in sorted(shapes.keys() - self._file_of)]
            problems += self._unexpected_tensors(shapes.keys())
            for name in sorted(shapes.keys() & self._file_of.keys()):
                found = [*self._slice(name).get_shape()]
                if found != shapes[name]:
                    problems.append(f"tensor {name} has shape {found}, the model needs {shapes[name]}")
        if problems:
            raise CheckpointError(f"checkpoint {self.path} does not fit the model:\n  " + "\n  ".join(problems))

    def _unexpected_tensors(self, names: Set[str]) -> list[str]:
        """What is wrong with the tensors that the model does not have, one line each.

        A tied head may be stored besides: tools that gather a sharded model save it twice. But only if it is equal:
        else one of the two would be lost.
        """
        unexpected = self._file_of.keys() - names
        untied = FAMILIES[self.family].hf_names(replace(self.sizes, tie_embeddings=False))
        head, embedding = untied["head.weight"], untied["backbone.tok_embeddings.weight"]
        problems = []
        if self.sizes.tie_embeddings and head in unexpected and embedding in self._file_of:
            unexpected.remove(head)
            if not torch.equal(self._slice(head)[:], self._slice(embedding)[:]):
                problems.append(f"tensor {head} differs from {embedding}, though config.json ties the two")
        return problems + [f"unexpected tensor {name}" for name in sorted(unexpected)]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """Read a weight by our name, or a slice of its first dimension: on the CPU, in the stored type."""
        tensor: Tensor = self._slice(self._names[name])[slice(None) if rows is None else rows]
        return tensor

    def _slice(self, hf_name: str) -> Any:
        return self._files[self._file_of[hf_name]].get_slice(hf_name)

    def fingerprint(self) -> str:
        """The sha256 of a few rows of every tensor: enough to notice another checkpoint without reading all of it."""
        digest = hashlib.sha256()
        for name in sorted(self._names.values()):
            weights = self._slice(name)
            num_rows = weights.get_shape()[0]
            digest.update(f"{name} {weights.get_dtype()} {weights.get_shape()}".encode())
            for number in range(_NUM_SAMPLED_ROWS):
                row = number * (num_rows - 1) // (_NUM_SAMPLED_ROWS - 1)
                rows = weights[row : row + 1]
                digest.update(rows.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _weight_files(self) -> list[str]:
        index = self.path / INDEX_NAME
        if index.exists():
            weight_map = read_json_object(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index} has no weight_map")
            files = sorted(set(weight_map.values()))
            if outside := [file for file in files if Path(file).name != file]:
                raise CheckpointError(f"{index} names files outside its directory: {outside}")
            return files
        if (self.path / _SINGLE_NAME).exists():
            return [_SINGLE_NAME]
        raise CheckpointError(
            f"{self.path} has neither {INDEX_NAME} nor {_SINGLE_NAME}; only safetensors are read (a .bin file is a "
            "pickle and can run code: convert it first)"
        )


def load_hf(
    path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> MaskedDiffusionLM:
    """Load a published checkpoint into one process, tensor by tensor.

    Args:
        path: directory with config.json and safetensors.
        dtype: type of the loaded weights.
        device: where they go.

    Returns:
        The model in evaluation mode.

    Raises:
        CheckpointError: if the directory cannot be read or does not hold exactly the tensors of its config.json.
    """
    checkpoint = HFCheckpoint(path)
    model = checkpoint.build()
    checkpoint.check(model)
    model = model.to(dtype).to_empty(device=device)
    init_rope(model)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(checkpoint.read(name))
    return model.eval()


def _read_architecture(file: Path, config: dict[str, Any]) -> tuple[str, TransformerSizes]:
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise CheckpointError(f"{file}: model_type is {model_type!r}; known: {', '.join(sorted(FAMILIES))}")
    try:
        return model_type, FAMILIES[model_type].sizes(config)
    except KeyError as error:
        raise CheckpointError(f"{file} has no key {error.args[0]!r}, which {model_type} needs") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}") from None


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError:
        raise CheckpointError(f"weight file {file} is missing; download the checkpoint again") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"weight file {file} is damaged or truncated ({error}); download it again") from None
