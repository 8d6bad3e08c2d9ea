"""The processes of a run, and the few sums and gathers that it needs."""

import ctypes
import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dllm_jepa.errors import LostRankError, UserError

Result = TypeVar("Result")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ROLL_CALL_SECONDS = 2.0

_STORE_PORT_KEY = "dllm_jepa/store_port"
_STORE_ONE_TRY = timedelta(seconds=2)
_STORE_ALL_TRIES_SECONDS = 300.0
_STORE_TIMEOUT = timedelta(minutes=30)  # as torch's own


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among the others. As a context manager it leaves them at the end.

    Args:
        rank: this process, from 0.
        world_size: number of processes.
        device: device of this process.
        mesh: mesh that parameters are sharded over ("shard", or "replicate" x "shard"); None for one process without
            a process group.
        group: gloo group for numbers and objects in main memory; None for one process.
        names: host and process id of every rank.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def join(cls, device: str, *, replicate: int = 1) -> "Ranks":
        """Join the process group that torchrun describes, if there is more than one process.

        Args:
            device: "cuda" or "cpu".
            replicate: number of groups of ranks that hold a whole model each; 1 shards over all ranks.
        """
        _die_with_launcher()
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls(0, 1, torch.device(device))
        own_device = torch.device(device)
        if device == "cuda":
            own_device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(own_device)
        rank = int(os.environ["RANK"])
        backend, store = "nccl" if device == "cuda" else "gloo", _fresh_store(rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        if replicate == 1:
            mesh = init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))
        else:
            shape = (replicate, world_size // replicate)
            mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
        ranks = cls(dist.get_rank(), world_size, own_device, mesh, dist.new_group(backend="gloo"))
        return replace(ranks, names=tuple(ranks.gather_objects(f"{socket.gethostname()}, pid {os.getpid()}")))

    def with_own_group(self) -> "Ranks":
        """The same ranks with another gloo group, for a second thread."""
        return self if self.group is None else replace(self, group=dist.new_group(backend="gloo"))

    def autocast(self, compute_dtype: torch.dtype) -> AbstractContextManager[None]:
        """bf16 matrix products in one process; sharded weights are already gathered in the compute type."""
        wanted = compute_dtype == torch.bfloat16 and self.mesh is None
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted)

    def seed(self, seed: int, step: int) -> None:
        """Seed torch for a step, so that a resumed run goes on with the same dropout and stochastic rounding.

        They are the only random calls of a step, and differ between ranks.
        """
        digest = hashlib.sha256(f"{seed}/{step}/{self.rank}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place; the same on every rank."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def sum_numbers(self, numbers: Sequence[int]) -> list[int]:
        """Sums over all ranks of whole numbers that every rank gives; costs no synchronization with a GPU."""
        if self.group is None:
            return list(numbers)
        values = torch.tensor(numbers)
        dist.all_reduce(values, group=self.group)
        return [int(value) for value in values]

    def largest(self, number: int) -> int:
        """The largest of a number that every rank gives; costs no synchronization with a GPU."""
        if self.group is None:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX, group=self.group)
        return int(value)

    def gather_rows(self, rows: Tensor, positions: Tensor, num_rows: int) -> Tensor:
        """Bring rows that are spread over ranks into one order; gradients flow to the rows of this rank alone.

        Every rank computes the same loss of all rows, and backpropagates it to its own; the sum of gradients over ranks
        is then that of the whole loss. Weights used behind the gathering would get their gradient once for every rank.
        Such a loss is summed over ranks as `count_once` gives it.

        Args:
            rows: [n, D], rows of this rank.
            positions: int64 [n], their places; together the ranks fill every place at most once.
            num_rows: rows of the result.

        Returns:
            [num_rows, D], the same on every rank; zero where no rank had a row.
        """
        gathered = rows.new_zeros(num_rows, rows.size(1))
        gathered[positions] = rows.detach()
        return self.sum(gathered).index_copy(0, positions, rows)

    def count_once(self, value: Tensor) -> Tensor:
        """A value that all ranks have computed alike as a part of a sum over ranks: the value itself, or zero.

        Its gradient stays what it is on every rank, see `gather_rows`.
        """
        return value if self.is_rank_zero else value - value.detach()

    def gather_objects(self, own: Result) -> list[Result]:
        """What every rank gives, in their order, on every rank."""
        if self.group is None:
            return [own]
        objects: list[Any] = [None] * self.world_size
        dist.all_gather_object(objects, own, group=self.group)
        return cast(list[Result], objects)

    def on_rank_zero(self, action: Callable[[], Result]) -> Result:
        """Do something on rank zero; every rank gets its result, or its error.

        Raises:
            OSError, UserError, SystemExit: on every rank, if `action` raises it.
        """
        outcome: list[Any] = [None, None]
        if self.is_rank_zero:
            try:
                outcome[0] = action()
            except (OSError, UserError, SystemExit) as error:
                outcome[1] = error
        if self.group is not None:
            dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(Result, outcome[0])

    def __enter__(self) -> "Ranks":
        """Nothing to do: `join` has joined."""
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        """Leave the process group; not one that fell apart, which would wait for those who are gone."""
        if not isinstance(error, RuntimeError) and not isinstance(error and error.__cause__, RuntimeError):
            if self.mesh is not None and dist.is_initialized():
                dist.destroy_process_group()

    def lost(self, error: BaseException) -> tuple[LostRankError, bool] | None:
        """What to say instead of an error that comes from another rank having ended; None if it does not.

        Returns:
            The error, and whether this rank is the first of those that are left.
        """
        # What gloo raises when a connection breaks is a plain RuntimeError.
        ended = self._ended() if isinstance(error, RuntimeError) else []
        if not ended:
            return None
        who = "; ".join(f"rank {rank} ({self.names[rank]}) has ended" for rank in ended)
        is_first = self.rank == min(set(range(self.world_size)) - {*ended})
        return LostRankError(f"{who}: the others cannot go on without it. Its own last lines say why"), is_first

    def _ended(self) -> list[int]:
        """The ranks whose connection is closed; one that is merely busy does not answer, but keeps it open."""
        if self.group is None:
            return []
        ended, answers = [], {}
        for peer in set(range(self.world_size)) - {self.rank}:
            try:
                dist.isend(torch.zeros(1), peer, self.group)
                answers[peer] = dist.irecv(torch.zeros(1), peer, self.group)
            except RuntimeError:
                ended.append(peer)
        deadline = time.monotonic() + _ROLL_CALL_SECONDS
        for peer, answer in answers.items():
            start = time.monotonic()
            seconds = max(deadline - start, 0.05)
            try:
                if answer is not None:
                    answer.wait(timedelta(seconds=seconds))
            except RuntimeError:
                if time.monotonic() < start + seconds:  # not for lack of an answer
                    ended.append(peer)
        return sorted(ended)


def _fresh_store(rank: int, world_size: int) -> TCPStore | None:
    """A store that only the ranks of this start write to; None if torch makes one of its own accord.

    torchrun's own store outlives a restart by `--max-restarts` and still holds the addresses of the dead ranks; who
    reads them before they are overwritten connects to nobody. So rank zero opens a store, and the shared one says no
    more than its port: an old port is one that refuses.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address = os.environ["MASTER_ADDR"]
    shared = TCPStore(address, int(os.environ["MASTER_PORT"]), is_master=False, timeout=_STORE_TIMEOUT)
    if rank == 0:
        own = TCPStore(address, 0, world_size, is_master=True, timeout=_STORE_TIMEOUT, wait_for_workers=False)
        shared.set(_STORE_PORT_KEY, str(own.port))
        return own
    deadline = time.monotonic() + _STORE_ALL_TRIES_SECONDS
    while True:
        port = int(shared.get(_STORE_PORT_KEY))
        try:
            store = TCPStore(address, port, world_size, is_master=False, timeout=_STORE_ONE_TRY, wait_for_workers=False)
        except DistError:
            if time.monotonic() > deadline:
                raise
        else:
            store.set_timeout(_STORE_TIMEOUT)
            return store


def _die_with_launcher() -> None:
    """Have the kernel end this process when its launcher ends.

    Nothing else reaches the workers of a killed torchrun; they would wait for each other, and hold GPUs and locks.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended in between
        os.kill(os.getpid(), signal.SIGKILL)
