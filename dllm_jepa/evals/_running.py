"""The score so far, for a progress bar."""

from collections.abc import Sequence

from dllm_jepa.evals._score import ItemResult


class RunningScores:
    """Mean of the task's own measure over the items so far."""

    def __init__(self) -> None:
        self._name = ""
        self._values: list[float] = []
        self._is_share = True

    def add(self, results: Sequence[ItemResult]) -> None:
        """Count the results of a batch."""
        for result in results:
            value = result.score.value
            self._name = next(iter(result.score.measures))
            if value is not None:
                self._is_share = isinstance(value, bool)
                self._values.append(float(value))

    def __str__(self) -> str:
        """Name and mean; nothing before the first item."""
        if not self._values:
            return ""
        mean = sum(self._values) / len(self._values)
        return f"{self._name} {mean:.1%}" if self._is_share else f"{self._name} {mean:.4f}"
