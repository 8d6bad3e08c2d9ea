"""Where the items and the shots of a task come from."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dllm_jepa.data import Row, Task, read_rows
from dllm_jepa.errors import ConfigError, DataError
from dllm_jepa.evals._shots import NO_SHOTS, ShotOrder, Shots, in_order


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
        """Read the rows to evaluate.

        Raises:
            DataError: the source or a row cannot be used.
        """
        return list(read_rows(self.source, fields=task.fields, split=self.split, name=self.name))

    def read_shots(self, task: Task, num_shots: int, order: ShotOrder, seed: int) -> Shots:
        """Read the rows that shots are taken from.

        Args:
            task: what stands in prompt and response.
            num_shots: solved examples in front of each question.
            order: see `in_order`.
            seed: seed of a drawn order.

        Raises:
            ConfigError: there are not enough, or nothing says where they are.
            DataError: the source or a row cannot be used.
        """
        if num_shots == 0:
            return NO_SHOTS
        source, name = (self.shots_source, None) if self.shots_source is not None else (self.source, self.name)
        if self.shots_source is None and (Path(source).exists() or Path(source).suffix in (".json", ".jsonl")):
            raise ConfigError(
                f"task.shots_source: missing; with num_shots={num_shots} it must name a file of solved examples, such "
                f"as train.jsonl, since {source} is a file and holds the items; or set num_shots=0"
            )
        rows = list(read_rows(source, fields=task.fields, split=self.shots_split, name=name))
        return Shots(solve(task, in_order(rows, order, seed)), num_shots, source)


def solve(task: Task, rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Questions and responses of rows.

    Raises:
        DataError: a row cannot be used.
    """
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
