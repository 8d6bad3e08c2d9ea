"""What the evaluation recipe needs of a task."""

from collections.abc import Sequence
from typing import Any, Protocol

from dllm_jepa.evals._score import ItemResult
from dllm_jepa.models import MaskedDiffusionLM


class EvalTask(Protocol):
    """Items, and what a model makes of them.

    The recipe sorts the items by length, cuts them into batches that do not depend on the number of ranks, and deals
    the batches to the ranks; so a task must give the same results for a batch wherever it is evaluated.

    Attributes:
        lengths: tokens that each item puts through the model, prompt and canvas together.
    """

    lengths: Sequence[int]

    def facts(self) -> dict[str, Any]:
        """What tells this evaluation from another one (JSON values): data, prompt and settings."""

    def evaluate(self, model: MaskedDiffusionLM, items: Sequence[int], *, batch_size: int) -> list[ItemResult]:
        """Results of some items, in their order.

        Args:
            model: the model, in evaluation mode, on its device.
            items: numbers of the items, each in [0, len(lengths)).
            batch_size: rows in one forward pass.
        """

    def remarks(self) -> dict[str, Any]:
        """What a reader of the scores has to know, such as the score of the best constant answer (JSON values)."""
