"""What the evaluation recipe needs of a task, and what a task gives: the results of items, and its fingerprint."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # results are read and compared without torch, which takes seconds to import
    from dllm_jepa.models import MaskedDiffusionLM


@dataclass(frozen=True)
class Score:
    """How a prediction fared.

    Args:
        measures: True or False (or a number) by the name of the measure, the task's own first; None where a measure
            does not apply to the row.
        note: why a prediction failed, in a few words, where that is known; "" otherwise.
    """

    measures: Mapping[str, bool | float | None]
    note: str = ""

    @property
    def value(self) -> bool | float | None:
        """The task's own measure."""
        return next(iter(self.measures.values()))


@dataclass(frozen=True)
class ItemResult:
    """What an evaluation writes down for one item; one line of generations.jsonl.

    Args:
        item: number of the item, from 0.
        name: where it comes from: `test.jsonl line 17`.
        score: its measures.
        num_tokens: tokens that were generated or scored.
        record: what a reader would want to see beside the measures, such as prompt, prediction and gold; JSON values.
    """

    item: int
    name: str
    score: Score
    num_tokens: int
    record: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """One flat object."""
        note = {"note": self.score.note} if self.score.note else {}
        return {
            "item": self.item,
            "name": self.name,
            "measures": dict(self.score.measures),
            **note,
            "num_tokens": self.num_tokens,
            **self.record,
        }


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

        Raises:
            ConfigError: naming the longest item and what to do.
        """

    def fingerprint(self) -> dict[str, Any]:
        """What identifies this evaluation (JSON values): data, prompt and settings.

        It differs whenever anything does that may change a result. `task` (its name) and `data_sha256` (of the rows,
        not of the prompts) are always there: only evaluations that agree in both are compared item by item.
        """

    def evaluate(self, model: "MaskedDiffusionLM", items: Sequence[int], *, batch_size: int) -> list[ItemResult]:
        """Results of some items, in their order, with `batch_size` rows in one forward pass."""

    def remarks(self) -> dict[str, Any]:
        """What a reader of the scores has to know, such as the score of the best constant answer (JSON values)."""


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


def sha256_of(values: Iterable[Any]) -> str:
    """A hash of JSON values in their order, such as the rows of a dataset."""
    digest = hashlib.sha256()
    for value in values:
        # No JSON value has a line feed outside of quotes, where it is written as an escape.
        digest.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def described(value: object) -> Any:
    """A dataclass as a JSON object, and what is none as it is.

    `kind` is the name of its class, since two kinds may have the same fields.
    """
    if not is_dataclass(value):
        return value
    return {"kind": type(value).__name__} | {
        field.name: described(getattr(value, field.name)) for field in fields(value)
    }
