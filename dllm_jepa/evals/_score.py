"""What came out for one item of an evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
