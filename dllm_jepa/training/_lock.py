"""One run at a time in a directory, also after a launcher died and left ranks behind."""

import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from dllm_jepa.errors import LaunchError
from dllm_jepa.training._ranks import Ranks

LOCK_NAME = ".lock"
_PATIENCE_SECONDS = 30.0
_POLL_SECONDS = 0.2
_TO_THE_END = 0  # as a number of bytes, for fcntl


class RunLock:
    """A lock that rank zero takes for the run and every rank holds a part of; the kernel frees it when they end.

    Rank r holds byte r of the file. A new run needs all bytes for a moment, so it cannot start beside any rank of an
    old one, even if that one's rank zero has died. Record locks are used since forked children do not inherit them.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK_NAME
        self._descriptor: int | None = None
        self._made: list[Path] = []  # by `acquire`

    def acquire(self) -> None:
        """Take the lock, on rank zero; makes the directory if it is missing. Another run has 30 seconds to end."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        self._make_directory()
        waiting = False
        while not self._try():
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"{self._path.parent} is in use by another run ({self._holder()}); choose another output_dir, or "
                    "wait for it to end"
                )
            if not waiting:
                print(
                    f"{self._path.parent} is in use by another run ({self._holder()}); waiting up to "
                    f"{_PATIENCE_SECONDS:.0f} s for it to end",
                    file=sys.stderr,
                )
            waiting = True
            time.sleep(_POLL_SECONDS)

    def join(self, rank: int) -> None:
        """Take the part of another rank; after `acquire` on rank zero."""
        if rank == 0:
            return
        try:
            self._descriptor = os.open(self._path, os.O_RDWR)
        except OSError as error:
            raise LaunchError(
                f"rank {rank} on {socket.gethostname()} cannot open {self._path} ({error}): output_dir must be on a "
                "file system that all machines share"
            ) from None
        if not self._lock(self._descriptor, first_byte=rank, num_bytes=1):
            raise LaunchError(f"rank {rank} of another run still uses {self._path.parent}; wait for it to end")

    def release(self, *, is_used: bool) -> None:
        """Free the lock; if the directory is not used, remove what was made for the lock.

        Otherwise the file stays: to remove it would let a third run past one that waits for it.
        """
        if self._descriptor is None:
            return
        for made in [] if is_used else self._made:
            if made.is_dir() and any(made.iterdir()):
                break  # somebody else has put something there
            made.rmdir() if made.is_dir() else made.unlink()
        os.close(self._descriptor)
        self._descriptor = None

    def _make_directory(self) -> None:
        directory = self._path.parent
        # The innermost first: the order in which they can be removed again.
        needed = (self._path.absolute(), *self._path.absolute().parents)
        self._made = [path for path in needed if not path.exists()]
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LaunchError(f"output_dir={directory} cannot be made: {error}") from None

    def _try(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise LaunchError(f"output_dir={self._path.parent} cannot be written: {error}") from None
        if not self._lock(descriptor, first_byte=0, num_bytes=_TO_THE_END) or not self._is_current(descriptor):
            os.close(descriptor)
            return False
        os.ftruncate(descriptor, 0)
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        os.pwrite(descriptor, f"{socket.gethostname()}, pid {os.getpid()}, since {now}\n".encode(), 0)
        self._descriptor = descriptor
        return True

    def _lock(self, descriptor: int, *, first_byte: int, num_bytes: int) -> bool:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, num_bytes, first_byte)
            if num_bytes == _TO_THE_END:  # all but the first byte are for the other ranks
                fcntl.lockf(descriptor, fcntl.LOCK_UN, _TO_THE_END, first_byte + 1)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if first_byte == 0:
                print(
                    f"warning: {self._path.parent} is on a file system without locks ({error.strerror}): see to it "
                    "yourself that one run at a time uses it",
                    file=sys.stderr,
                )
        return True

    def _is_current(self, descriptor: int) -> bool:
        """Whether the locked file is still the one that has the name."""
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self._path))
        except FileNotFoundError:
            return False

    def _holder(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8", errors="replace").strip() or "unknown"
        except OSError:
            return "unknown"


@contextmanager
def locked(directory: Path, ranks: Ranks) -> Iterator[None]:
    """Hold a directory, which is made if it is missing, against other runs; on all ranks at once.

    Raises:
        LaunchError: if another run keeps it, or it cannot be written.
    """
    lock = RunLock(directory)
    ranks.on_rank_zero(lock.acquire)
    try:
        lock.join(ranks.rank)
        yield
    finally:
        # Rank zero may have removed what it made for the lock.
        is_used = directory.is_dir() and any(path.name != LOCK_NAME for path in directory.iterdir())
        lock.release(is_used=is_used)
