"""Shots: the solved examples that stand in front of a question, and where they come from."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeVar, get_args

from dllm_jepa.data import Row, Task, is_row_file, naming, read_rows
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


def read_solved(
    fields: Sequence[str],
    num_shots: int,
    *,
    source: str,
    name: str | None,
    shots_source: str | None,
    shots_split: str,
) -> tuple[Iterable[Row], str]:
    """The rows that shots are taken from, none for 0 shots, and where they come from.

    Args:
        fields: fields that every row must have.
        num_shots: solved examples in front of each question, 0 or more.
        source: file or hub dataset of the items.
        name: configuration of that hub dataset.
        shots_source: a file, or another hub dataset; None for that of the items. A file of items has no shots.
        shots_split: split of a hub dataset.
    """
    if num_shots < 0:
        raise ValueError(f"num_shots must be 0 or more, got {num_shots}")
    if num_shots == 0:
        return (), "nothing"
    if shots_source is None and is_row_file(source):
        raise ConfigError(
            f"task.shots_source: missing; with num_shots={num_shots} it must name a file of solved examples, such "
            f"as train.jsonl, since {source} is a file and holds the items; or set num_shots=0"
        )
    # The configuration is that of the items' dataset; another source, such as a file, has none.
    name = name if shots_source in (None, source) else None
    shots_source = shots_source or source
    return read_rows(shots_source, fields=fields, split=shots_split, name=name), shots_source


def solve(task: Task, rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Questions and responses of rows."""
    examples = []
    for row in rows:
        with naming(row):
            examples.append((task.question(row.values), row.values[task.response_field]))
    return examples
