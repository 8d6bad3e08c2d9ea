"""Shots: the solved examples that stand in front of a question."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar, get_args

from dllm_jepa.errors import ConfigError

ShotOrder = Literal["first_k", "seeded"]

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class Shots:
    """Solved examples, the same in front of every question that is not among them.

    Args:
        examples: (question, response), in the order in which they are taken.
        num_shots: how many are taken, 0 or more.
        source: where they come from, for messages.
    """

    examples: Sequence[tuple[str, str]]
    num_shots: int
    source: str

    def __post_init__(self) -> None:
        """Check that there are enough."""
        if self.num_shots < 0:
            raise ValueError(f"num_shots must be 0 or more, got {self.num_shots}")
        if self.num_shots > len(self.examples):
            raise ConfigError(
                f"num_shots={self.num_shots}, but {self.source} has only {len(self.examples)} rows: lower num_shots"
            )

    @property
    def usual(self) -> Sequence[tuple[str, str]]:
        """The shots in front of a question that is not among them."""
        return self.examples[: self.num_shots]

    def before(self, question: str) -> list[tuple[str, str]]:
        """The shots in front of a question: the first `num_shots` that ask something else.

        The question itself, as a shot, would give its answer away; the next example takes its place, so that every
        prompt has as many.
        """
        others = (example for example in self.examples if example[0] != question)
        shots = list(islice(others, self.num_shots))
        if len(shots) < self.num_shots:
            raise ConfigError(
                f"num_shots={self.num_shots}, but of the {len(self.examples)} rows of {self.source} only {len(shots)} "
                f"ask something else than the item {question[:80]!r}: lower num_shots"
            )
        return shots


def in_order(rows: Sequence[_Row], order: ShotOrder, seed: int) -> list[_Row]:
    """Rows in the order in which shots are taken: `first_k` leaves that of the file, `seeded` draws one."""
    if order not in get_args(ShotOrder):
        raise ValueError(f"shots must be {' or '.join(get_args(ShotOrder))}, got {order!r}")
    if order == "first_k":
        return list(rows)
    # Of a generator only `random` gives the same numbers in every version of Python.
    generator = random.Random(f"shots {seed}")
    keys = [generator.random() for _ in rows]
    return [rows[index] for index in sorted(range(len(rows)), key=keys.__getitem__)]
