"""One process without a process group: the same calls, and no communication."""

import pytest
import torch
import torch.distributed as dist

from dllm_jepa.training import Ranks


@pytest.fixture(params=[None, "1"], ids=["plain python", "torchrun with one process"])
def ranks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    if request.param is None:
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", request.param)
    return Ranks.join("cpu")


def test_stands_alone(ranks: Ranks) -> None:
    assert (ranks.rank, ranks.world_size, ranks.mesh, ranks.device) == (0, 1, None, torch.device("cpu"))
    assert ranks.is_rank_zero
    assert not dist.is_initialized()


def test_only_rank_zero_writes() -> None:
    assert not Ranks(1, 2, torch.device("cpu")).is_rank_zero


def test_a_sum_is_what_it_was(ranks: Ranks) -> None:
    values = torch.tensor([3, 4])
    assert ranks.sum(values) is values
    assert values.tolist() == [3, 4]


def test_rows_are_put_in_order(ranks: Ranks) -> None:
    rows = torch.arange(6.0).view(3, 2)
    gathered = ranks.gather_rows(rows, torch.tensor([3, 0, 1]), 5)
    assert gathered.tolist() == [[2, 3], [4, 5], [0, 0], [0, 1], [0, 0]]
    assert gathered.dtype == rows.dtype
    assert ranks.gather_rows(rows[:0], torch.zeros(0, dtype=torch.int64), 2).tolist() == [[0, 0], [0, 0]]
