"""How the ranks of one start find each other."""

import os
import time
from datetime import timedelta

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

_PORT_KEY = "dllm_jepa/store_port"
_ONE_TRY = timedelta(seconds=2)
_ALL_TRIES_SECONDS = 300.0
_TIMEOUT = timedelta(minutes=30)  # as torch's own


def fresh_store(rank: int, world_size: int) -> TCPStore | None:
    """A store that only the ranks of this start write to; None if torch makes one of its own accord.

    torchrun lends its own store, which lives as long as the launcher. After `--max-restarts` has started the ranks
    again it still holds the addresses of the dead ones, and a rank that reads one before it is overwritten connects to
    nobody. So rank zero opens a store, and the shared one says no more than its port: an old port is one that refuses.

    Args:
        rank: this rank.
        world_size: number of ranks.

    Raises:
        DistError: if rank zero's store cannot be reached for five minutes.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address = os.environ["MASTER_ADDR"]
    shared = TCPStore(address, int(os.environ["MASTER_PORT"]), is_master=False, timeout=_TIMEOUT)
    if rank == 0:
        own = TCPStore(address, 0, world_size, is_master=True, timeout=_TIMEOUT, wait_for_workers=False)
        shared.set(_PORT_KEY, str(own.port))
        return own
    deadline = time.monotonic() + _ALL_TRIES_SECONDS
    while True:
        port = int(shared.get(_PORT_KEY))
        try:
            store = TCPStore(address, port, world_size, is_master=False, timeout=_ONE_TRY, wait_for_workers=False)
        except DistError:
            if time.monotonic() > deadline:
                raise
        else:
            store.set_timeout(_TIMEOUT)
            return store
