"""The manifest of a checkpoint: name, size and checksum of each of its files, and of itself."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
    """What a file must be."""

    size: int  # bytes
    sha256: str


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
    """Read the manifest, which must be to the byte what `write_manifest` wrote."""
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
    """What is wrong with a file of a checkpoint, if anything; an OSError if it is there but cannot be read."""
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
