"""Signs of collapse in the pooled embeddings.

Shape legend: R rows of the buffer, D hidden.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MONITOR_ROWS = 256


def effective_rank(embeddings: Tensor) -> float:
    """Exp of the entropy of the normalized singular values of the centred matrix.

    Means nothing without the number of rows, which bounds it.

    Args:
        embeddings: [R, D].

    Returns:
        A number in [1, min(R - 1, D)]; 1 when all rows are equal.

    Source: Roy & Vetterli 2007, "The effective rank", definition 1, on the centred matrix.
    """
    centred = embeddings.double() - embeddings.double().mean(0)
    singular_values = torch.linalg.svdvals(centred)
    total = singular_values.sum()
    if total == 0:
        return 1.0
    shares = singular_values / total
    return float(torch.exp(-torch.xlogy(shares, shares).sum()))


def cosine_diversity(embeddings: Tensor) -> float:
    """1 minus the mean cosine of all pairs of different rows.

    Args:
        embeddings: [R, D], R >= 2.

    Returns:
        A number in [0, R / (R - 1)]; 0 when all rows point the same way.
    """
    directions = F.normalize(embeddings.double(), dim=-1)
    num_rows = len(directions)
    # The sum over all pairs is |sum of the unit vectors|^2; the diagonal takes R of it.
    off_diagonal = directions.sum(0).square().sum() - directions.square().sum()
    return float(1 - off_diagonal / (num_rows * (num_rows - 1)))


class CollapseMonitor:
    """Effective rank and cosine diversity of the last pooled embeddings, every `monitor_every` steps.

    Args:
        monitor_every: steps between measurements; 0 is off.
        global_batch_size: sequences of a step.
        embed_dim: D.
        device: device of the embeddings.
        max_rows: rows of the buffer.
    """

    def __init__(
        self,
        *,
        monitor_every: int,
        global_batch_size: int,
        embed_dim: int,
        device: torch.device,
        max_rows: int = MONITOR_ROWS,
    ) -> None:
        self._monitor_every = monitor_every
        self._steps_in_buffer = -(-max_rows // global_batch_size)
        self._buffer = torch.zeros(max_rows, embed_dim, device=device)
        self._num_rows = 0
        self._first_rank = 0.0
        self._first_rows = 0

    def measures(self, step: int) -> bool:
        """Whether `step` (from 0) ends with a measurement."""
        return self._monitor_every > 0 and (step + 1) % self._monitor_every == 0

    def collects(self, step: int) -> bool:
        """Whether the embeddings of `step` are still in the buffer at the next measurement."""
        if self._monitor_every == 0:
            return False
        return self._monitor_every - 1 - step % self._monitor_every < self._steps_in_buffer

    def add(self, embeddings: Tensor) -> None:
        """Append the online context embeddings of a global batch, fp32 [G, D] in batch order."""
        rows = torch.cat((self._buffer, embeddings.detach()))[-len(self._buffer) :]
        self._buffer.copy_(rows)
        self._num_rows = min(self._num_rows + len(embeddings), len(self._buffer))

    def measure(self) -> tuple[dict[str, float], str | None]:
        """Measure the buffer.

        Returns:
            `effective_rank`, `cosine_diversity`, `monitor_rows`, and a warning when the rank has fallen below half of
            its first value over as many rows.
        """
        rows = self._buffer[len(self._buffer) - self._num_rows :]
        rank = effective_rank(rows)
        values = {"effective_rank": rank, "monitor_rows": len(rows)}
        if len(rows) > 1:
            values["cosine_diversity"] = cosine_diversity(rows)
        if self._first_rows < len(rows):  # ranks of fewer rows are no measure for this one
            self._first_rank, self._first_rows = rank, len(rows)
        if rank >= self._first_rank / 2:
            return values, None
        return values, (
            f"the pooled embeddings may be collapsing: effective rank {rank:.1f} over {len(rows)} rows, "
            f"{self._first_rank:.1f} at the first measurement"
        )

    def tensors(self) -> dict[str, Tensor]:
        """The buffer, live: to be saved, or loaded in place."""
        return {"buffer": self._buffer}

    def state_dict(self) -> dict[str, float]:
        """Everything but the buffer."""
        return {"num_rows": self._num_rows, "first_rank": self._first_rank, "first_rows": self._first_rows}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore `state_dict()`."""
        self._num_rows = int(state["num_rows"])
        self._first_rank, self._first_rows = state["first_rank"], int(state["first_rows"])
