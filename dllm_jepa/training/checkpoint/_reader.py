"""Reading a checkpoint: nothing of it is trusted before its manifest."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dllm_jepa.errors import CheckpointError
from dllm_jepa.training._ranks import Ranks
from dllm_jepa.training.checkpoint._manifest import (
    CONFIG_NAME,
    STATE_NAME,
    FileRecord,
    UnreadableError,
    damage_of,
    read_manifest,
)

if TYPE_CHECKING:  # DCP takes half as long to import as torch itself: `_dcp` is imported when tensors are read
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

_NUM_NAMED_TENSORS = 20


class SavedCheckpoint:
    """A complete checkpoint on disk, with a manifest that is in order. Its files are checked by `verify`.

    Raises:
        NewerFormatError: if only a later version can read it.
        CheckpointError: if it is not there, or not a checkpoint.
    """

    def __init__(self, path: Path) -> None:
        path = path.resolve()  # `latest` is a link, which a run that goes on meanwhile leads elsewhere
        self.path = path
        if not path.is_dir():
            what = "is a file, not a checkpoint directory" if path.exists() else "does not exist"
            raise CheckpointError(f"checkpoint {path} {what}")
        self.files: Mapping[str, FileRecord] = read_manifest(path)

    @property
    def size(self) -> int:
        """Bytes on disk, the manifest aside."""
        return sum(record.size for record in self.files.values())

    def verify(self, ranks: Ranks | None = None) -> None:
        """Read every file and compare it with the manifest; the ranks share the work and the verdict.

        Raises:
            UnreadableError: if a file cannot be read, on whichever rank.
            CheckpointError: naming every damaged or missing file.
        """
        largest_first = sorted(self.files, key=lambda name: (-self.files[name].size, name))
        rank, world_size = (0, 1) if ranks is None else (ranks.rank, ranks.world_size)
        damages, unreadable = [], []
        for name in largest_first[rank::world_size]:
            try:
                damages.append(damage_of(self.path, name, self.files[name]))
            except OSError as error:
                unreadable.append(f"{name}: {error}")
        if ranks is not None:
            damages = sum(ranks.gather_objects(damages), [])
            unreadable = sum(ranks.gather_objects(unreadable), [])
        if unreadable:
            raise UnreadableError(f"checkpoint {self.path} cannot be read: {'; '.join(sorted(unreadable))}")
        if found := sorted(filter(None, damages)):
            raise CheckpointError(f"checkpoint {self.path} is damaged: {'; '.join(found)}")

    @functools.cached_property
    def state(self) -> dict[str, Any]:
        """Everything that is not a tensor."""
        try:
            state = json.loads((self.path / STATE_NAME).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{self.path / STATE_NAME} cannot be read: {error}") from None
        if not isinstance(state, dict) or not isinstance(state.get("step"), int):
            raise CheckpointError(f"{self.path / STATE_NAME} names no step")
        return state

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.state["step"])

    @property
    def config(self) -> Path:
        """The config that the run was started with."""
        return self.path / CONFIG_NAME

    @functools.cached_property
    def tensors(self) -> "dict[str, TensorStorageMetadata]":
        """Shape and type of every tensor, by name."""
        return cast("dict[str, TensorStorageMetadata]", self._metadata.state_dict_metadata)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """One whole tensor on the CPU, converted to a type while it is read."""
        tensor = torch.empty(self.tensors[name].size, dtype=dtype)
        self._load({name: tensor}, None)
        return tensor

    def check_shapes(self, tensors: Mapping[str, Tensor], *, part: str = "") -> None:
        """Compare with the names and shapes of tensors that are to be filled; only of names that begin with `part`."""
        found = {name: tuple(entry.size) for name, entry in self.tensors.items() if name.startswith(part)}
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if found != wanted:
            raise CheckpointError(f"checkpoint {self.path} is of another run:\n  {_differences(found, wanted)}")

    def read_into(self, tensors: Mapping[str, Tensor], ranks: Ranks) -> None:
        """Fill existing tensors in place, whatever the number of ranks that saved them; on all ranks at once."""
        self.check_shapes(tensors)
        self._load(dict(tensors), ranks.group)

    def _load(self, tensors: dict[str, Tensor], group: ProcessGroup | None) -> None:
        from dllm_jepa.training.checkpoint import _dcp

        _dcp.read_tensors(self.path, self._metadata, tensors, group)

    @functools.cached_property
    def _metadata(self) -> "Metadata":
        from dllm_jepa.training.checkpoint import _dcp

        return _dcp.read_metadata(self.path, self.files.keys())


def _differences(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
    names = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    lines = [f"{name}: saved {found.get(name, 'nothing')}, needed {wanted.get(name, 'nothing')}" for name in names]
    more = len(lines) - _NUM_NAMED_TENSORS
    return "\n  ".join([*lines[:_NUM_NAMED_TENSORS], f"and {more} more"] if more > 0 else lines)
