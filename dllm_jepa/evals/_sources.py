"""Where the items and the shots of a task come from."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from dllm_jepa.data import Row, Task, is_row_file, read_rows
from dllm_jepa.errors import ConfigError, DataError
from dllm_jepa.evals._shots import ShotOrder, Shots, in_order


@dataclass(frozen=True)
class Sources:
    """Files, or a dataset on the hub; the builders of tasks take these as arguments.

    Args:
        source: items: a .jsonl file, or a hub dataset such as openai/gsm8k.
        split: split of a hub dataset.
        name: configuration of a hub dataset, such as `main`.
        shots_source: a file with the rows that shots are taken from; None for the same hub dataset.
        shots_split: split of the hub dataset for shots.
    """

    source: str
    split: str
    name: str | None
    shots_source: str | None
    shots_split: str

    def read_items(self, task: Task) -> list[Row]:
        """The rows to evaluate."""
        return list(read_rows(self.source, fields=task.fields, split=self.split, name=self.name))

    def read_solved(self, fields: Sequence[str], num_shots: int) -> tuple[Iterable[Row], str]:
        """The rows that shots are taken from, none for 0 shots, and where they come from."""
        if num_shots < 0:
            raise ValueError(f"num_shots must be 0 or more, got {num_shots}")
        if num_shots == 0:
            return (), "nothing"
        if self.shots_source is None and is_row_file(self.source):
            raise ConfigError(
                f"task.shots_source: missing; with num_shots={num_shots} it must name a file of solved examples, such "
                f"as train.jsonl, since {self.source} is a file and holds the items; or set num_shots=0"
            )
        # The configuration is that of the items' dataset; another source, such as a file, has none.
        name = self.name if self.shots_source in (None, self.source) else None
        source = self.shots_source or self.source
        return read_rows(source, fields=fields, split=self.shots_split, name=name), source

    def read_shots(self, task: Task, num_shots: int, order: ShotOrder, seed: int) -> Shots:
        """The shots of a task that generates."""
        rows, source = self.read_solved(task.fields, num_shots)
        return Shots(solve(task, in_order(list(rows), order, seed)), num_shots, source)


def solve(task: Task, rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Questions and responses of rows."""
    examples = []
    for row in rows:
        with naming(row):
            examples.append((task.question(row.values), row.values[task.response_field]))
    return examples


@contextmanager
def naming(row: Row) -> Iterator[None]:
    """Put the name of a row in front of what is wrong with it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{row.name}: {error}") from error
