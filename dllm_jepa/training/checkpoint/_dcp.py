"""Tensors on disk by torch.distributed.checkpoint (DCP): hashed while they are written, never unpickled when read.

The checksums are taken of the bytes on their way to the disk, not read back from it. So they certify what was meant,
and a save reads nothing.
"""

import hashlib
import io
import pathlib
import pickle
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.serialization import _get_layout

from dllm_jepa.errors import CheckpointError
from dllm_jepa.training.checkpoint._manifest import METADATA_NAME, FileRecord


def write_tensors(
    directory: Path, tensors: dict[str, Tensor], files: "HashingFileSystem", group: ProcessGroup | None
) -> None:
    """Write this rank's part of the tensors; a CheckpointException, on every rank, if one of them cannot."""
    writer = FileSystemWriter(directory)
    writer.fs = files
    save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)


def read_tensors(path: Path, metadata: Metadata, tensors: dict[str, Tensor], group: ProcessGroup | None) -> None:
    """Fill existing tensors in place; a CheckpointError, on every rank of the group, if one of them cannot."""
    try:
        load(tensors, storage_reader=_Reader(path, metadata), process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {'; '.join(causes(error))}") from error


def read_metadata(directory: Path, files: Collection[str]) -> Metadata:
    """Read which tensors are where, without executing anything.

    Refused is what DCP would unpickle, or follow out of the `files` of the manifest.
    """
    path = directory / METADATA_NAME
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    # What the unpickler raises for bytes that are no pickle, or one that does not fit the admitted classes.
    except (OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, pickle.PickleError) as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    try:
        entries, places = dict(metadata.state_dict_metadata), dict(metadata.storage_data)
        others = [name for name, entry in entries.items() if not isinstance(entry, TensorStorageMetadata)]
        unlisted = {place.relative_path for place in places.values()} - {*files}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    if others:
        raise CheckpointError(f"{path} is refused: {others[0]} is not a tensor")
    if unlisted:
        raise CheckpointError(f"{path} is refused: {sorted(unlisted)[0]} is not in the manifest")
    return cast(Metadata, metadata)


def causes(error: CheckpointException) -> list[str]:
    """What went wrong, on whichever ranks, without tracebacks."""
    return sorted({str(cause).partition("\n")[0] for cause, _ in error.failures.values()})


class HashingFileSystem(FileSystem):
    """The file system that DCP writes to.

    Attributes:
        records: every file written through it, by name.
        failure: why a write failed; what torch makes of it does not say.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, FileRecord] = {}
        self.failure: str | None = None

    @contextmanager
    def create_stream(self, path: str | PathLike[str], mode: str) -> Iterator[io.IOBase]:
        """Open a file and note, when it is closed, what was written."""
        with super().create_stream(path, mode) as raw:
            stream = _HashingStream(raw)
            try:
                yield stream
            finally:
                self.failure = self.failure or stream.failure
        self.records[Path(path).name] = stream.record()

    def rename(self, path: str | PathLike[str], new_path: str | PathLike[str]) -> None:
        """Rename a file and its record."""
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _HashingStream(io.IOBase):
    """Passes writes on and hashes them. There is no seeking: what is hashed is what stands in the file."""

    def __init__(self, raw: io.IOBase) -> None:
        self._raw = cast(io.BufferedWriter, raw)
        self._hash = hashlib.sha256()
        self._size = 0
        self.failure: str | None = None

    def write(self, data: Any) -> int:
        try:
            self._raw.write(data)
        except OSError as error:
            self.failure = str(error)
            raise
        self._hash.update(data)
        written = memoryview(data).nbytes
        self._size += written
        return written

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        if not self._raw.closed:
            self._raw.flush()

    def fileno(self) -> int:
        # DCP asks for it to fsync, in places with bytes still in Python's own buffer.
        self.flush()
        return self._raw.fileno()

    def close(self) -> None:
        self._raw.close()
        super().close()

    def record(self) -> FileRecord:
        return FileRecord(self._size, self._hash.hexdigest())


# Everything that the pickle of DCP's metadata is made of. Paths become pure ones, which touch no disk.
_METADATA_CLASSES: dict[tuple[str, str], Any] = {
    (cls.__module__, cls.__qualname__): cls
    for cls in (
        Metadata,
        StorageMeta,
        TensorStorageMetadata,
        dcp_metadata.ChunkStorageMetadata,
        dcp_metadata.BytesStorageMetadata,
        dcp_metadata.MetadataIndex,
        dcp_metadata.TensorProperties,
        dcp_metadata._MEM_FORMAT_ENCODING,
        _StorageInfo,
        torch.Size,
    )
} | {
    ("torch.serialization", "_get_layout"): _get_layout,
    ("pathlib", "PosixPath"): pathlib.PurePosixPath,
    ("pathlib._local", "PosixPath"): pathlib.PurePosixPath,
}


# The one in Python: that in C cannot be told how to set the state of an object.
_PythonUnpickler: Any = pickle._Unpickler


class _MetadataUnpickler(_PythonUnpickler):  # type: ignore[misc]
    """Admits the classes of DCP's metadata and types of tensors, nothing else."""

    dispatch = dict(_PythonUnpickler.dispatch)

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """Resolve one of the names that are admitted."""
        if found := _METADATA_CLASSES.get((module_name, global_name)):
            return found
        if module_name == "torch" and isinstance(dtype := getattr(torch, global_name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which no checkpoint needs")

    def load_build(self) -> None:
        """Set the state of an object; never that of a class or function, which the whole process shares."""
        target = self.stack[-2]
        if isinstance(target, type) or target is _get_layout:
            raise pickle.UnpicklingError(f"it changes {target.__qualname__} itself")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


class _Reader(FileSystemReader):
    """DCP's reader, with metadata that were read once and safely."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata
