"""Writing files so that a crash, at whatever moment, leaves either the old content or the new one."""

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file; it is on the disk when this returns. An OSError leaves what was there before."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        write_durably(unfinished, text)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_durably(path: Path, text: str) -> None:
    """Write a text file and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def sync_files(directory: Path) -> None:
    """Wait until the content of every file of a directory is on the disk."""
    for path in directory.iterdir():
        if path.is_file():
            _sync(path)


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    _sync(directory)


def publish(unfinished: Path, final: Path) -> None:
    """Give a complete directory its final name, as the last thing that happens to it; OSError if that is taken."""
    sync_directory(unfinished)
    unfinished.rename(final)
    sync_directory(final.parent)


def free_name(path: Path, ending: str) -> Path:
    """A name beside `path` that nothing has yet: `path` with an ending, and a number if that is taken."""
    name, number = path.with_name(path.name + ending), 1
    while os.path.lexists(name):
        number += 1
        name = path.with_name(f"{path.name}{ending}{number}")
    return name


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
