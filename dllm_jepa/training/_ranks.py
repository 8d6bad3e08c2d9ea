"""The processes of a run, and the few sums and gathers the method needs."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among the others.

    Args:
        rank: this process, from 0.
        world_size: number of processes.
        device: device of this process.
        mesh: mesh that parameters are sharded over ("shard", or "replicate" x "shard"); None for one process without
            a process group.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None = None

    @classmethod
    def join(cls, device: str, *, replicate: int = 1) -> "Ranks":
        """Join the process group that torchrun describes, if there is more than one process.

        Args:
            device: "cuda" or "cpu".
            replicate: number of groups of ranks that hold a whole model each; 1 shards over all ranks.
        """
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            return cls(0, 1, torch.device(device))
        own_device = torch.device(device)
        if device == "cuda":
            own_device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(own_device)
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        if replicate == 1:
            mesh = init_device_mesh(device, (world_size,), mesh_dim_names=("shard",))
        else:
            shape = (replicate, world_size // replicate)
            mesh = init_device_mesh(device, shape, mesh_dim_names=("replicate", "shard"))
        return cls(dist.get_rank(), world_size, own_device, mesh)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, in place; the same on every rank."""
        if self.mesh is not None:
            dist.all_reduce(values)
        return values

    def gather_rows(self, rows: Tensor, positions: Tensor, num_rows: int) -> Tensor:
        """Bring rows that are spread over ranks into one order.

        Args:
            rows: [n, D], rows of this rank.
            positions: int64 [n], their places; together the ranks fill every place at most once.
            num_rows: rows of the result.

        Returns:
            [num_rows, D], the same on every rank; zero where no rank had a row.
        """
        gathered = rows.new_zeros(num_rows, rows.size(1))
        gathered[positions] = rows
        return self.sum(gathered)

    def wait(self) -> None:
        """Wait until all ranks are here."""
        if self.mesh is not None:
            dist.barrier()

    def leave(self) -> None:
        """Leave the process group."""
        if self.mesh is not None:
            dist.destroy_process_group()
