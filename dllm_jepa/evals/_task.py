"""What the evaluation recipe needs of a task."""

from collections.abc import Sequence
from typing import Any, Protocol

from dllm_jepa.evals._score import ItemResult
from dllm_jepa.models import MaskedDiffusionLM


class EvalTask(Protocol):
    """Items, and what a model makes of them.

    The recipe sorts the items by length, cuts them into batches that do not depend on the number of ranks, and deals
    the batches to the ranks; so a task must give the same results for a batch wherever it is evaluated.
    """

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens that each item puts through the model, prompt and canvas together."""

    def check_context(self, max_seq_len: int) -> None:
        """Refuse items that do not fit into a model; called before its weights are loaded.

        Args:
            max_seq_len: context of the model in tokens.

        Raises:
            ConfigError: naming the longest item and what to do.
        """

    def facts(self) -> dict[str, Any]:
        """What tells this evaluation from another one (JSON values): data, prompt and settings.

        They differ whenever anything does that may change a result. `task` (its name) and `data_sha256` (of the rows,
        not of the prompts) are always there: only evaluations that agree in both are compared item by item.
        """

    def evaluate(self, model: MaskedDiffusionLM, items: Sequence[int], *, batch_size: int) -> list[ItemResult]:
        """Results of some items, in their order.

        Args:
            model: the model, in evaluation mode, on its device.
            items: numbers of the items, each in [0, len(lengths)).
            batch_size: rows in one forward pass.
        """

    def remarks(self) -> dict[str, Any]:
        """What a reader of the scores has to know, such as the score of the best constant answer (JSON values)."""
