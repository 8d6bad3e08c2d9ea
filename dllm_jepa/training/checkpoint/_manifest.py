"""The manifest of a checkpoint: name, size and checksum of each of its files, and of itself.

The checksums are taken of the bytes on their way to the disk, not read back from it. So they certify what was meant,
and a save reads nothing.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem

from dllm_jepa.errors import CheckpointError
from dllm_jepa.files import write_durably

MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
CONFIG_NAME = "config.yaml"
METADATA_NAME = ".metadata"  # DCP's own
REQUIRED = {STATE_NAME, CONFIG_NAME, METADATA_NAME}
FORMAT = 1


class NewerFormatError(CheckpointError):
    """A checkpoint that only a later version can read; it is not damaged."""


class UnreadableError(CheckpointError):
    """A checkpoint that cannot be read at the moment; nothing says that it is damaged."""


@dataclass(frozen=True)
class FileRecord:
    """What a file must be.

    Args:
        size: bytes.
        sha256: checksum, in hexadecimal.
    """

    size: int
    sha256: str


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


def record_of(path: Path) -> FileRecord:
    """Read a file and describe it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(file.tell(), digest)


def write_manifest(directory: Path, records: Mapping[str, FileRecord]) -> None:
    """Write the manifest of a directory, which must be the last of its files."""
    content = {"format": FORMAT, "files": {name: asdict(record) for name, record in records.items()}}
    write_durably(directory / MANIFEST_NAME, _canonical(content | {"sha256": _checksum(content)}))


def read_manifest(directory: Path) -> dict[str, FileRecord]:
    """Read and check the manifest itself.

    Raises:
        NewerFormatError: if it is of a later format.
        CheckpointError: if it is missing or not, to the byte, what `write_manifest` wrote.
    """
    path = directory / MANIFEST_NAME
    try:
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text)
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is not a complete training checkpoint: it has no {MANIFEST_NAME}") from None
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    body = {key: content[key] for key in content if key != "sha256"} if isinstance(content, dict) else {}
    if not body or content.get("sha256") != _checksum(body) or text != _canonical(content):
        raise CheckpointError(f"{path} is damaged: it does not match its own checksum")
    try:
        if body["format"] > FORMAT:
            raise NewerFormatError(
                f"{directory} has format {body['format']}, and this version of dllm-jepa reads format {FORMAT}: "
                "update dllm-jepa"
            )
        files = {str(name): FileRecord(**record) for name, record in body["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a manifest of dllm-jepa: {error!r}") from None
    if outside := [name for name in files if Path(name).name != name or name in ("", "..") or "\0" in name]:
        raise CheckpointError(f"{path} names files outside its directory: {outside}")
    if missing := sorted(REQUIRED - files.keys()):
        raise CheckpointError(f"{path} does not list {', '.join(missing)}")
    if any(type(record.size) is not int for record in files.values()):
        raise CheckpointError(f"{path} is not a manifest of dllm-jepa: a size is not a number")
    return files


def damage_of(directory: Path, name: str, expected: FileRecord) -> str | None:
    """What is wrong with a file of a checkpoint; None if nothing is.

    Raises:
        OSError: if it is there but cannot be read.
    """
    path = directory / name
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{name} has {size:,} bytes, not {expected.size:,}"
        found = record_of(path)
    except FileNotFoundError:
        return f"{name} is missing"
    return None if found == expected else f"{name} does not match its checksum"


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()
