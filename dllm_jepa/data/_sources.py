"""Where rows come from: a local file with one JSON object per line, or a dataset on the hub."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dllm_jepa.errors import DataError

_JSON_NAMES = {
    str: "text",
    int: "a number",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


@dataclass(frozen=True)
class Row:
    """One row of a dataset.

    Args:
        name: where it stands, for messages: `train.jsonl line 17`.
        values: its fields.
    """

    name: str
    values: Mapping[str, Any]


@contextmanager
def naming(row: Row) -> Iterator[None]:
    """Put the name of a row in front of what is wrong with it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{row.name}: {error}") from error


def is_row_file(source: str) -> bool:
    """Whether a source is a file, there or not, and no dataset on the hub."""
    return Path(source).exists() or Path(source).suffix in (".json", ".jsonl")


def read_rows(
    source: str,
    *,
    fields: Sequence[str],
    split: str = "train",
    name: str | None = None,
    kind: type = str,
    max_rows: int | None = None,
) -> Iterator[Row]:
    """Read rows that have certain fields.

    Args:
        source: a .jsonl or .json file with one object per line, or the name of a dataset on the hub if there is no
            such file and the name does not end in .jsonl or .json.
        fields: fields that every row must have.
        split: split of a hub dataset; a file is its own split.
        name: configuration of a hub dataset, such as `main` of openai/gsm8k.
        kind: what the fields hold: str or list.
        max_rows: read only the first so many, at least 1; None for all. A hub dataset is fetched as a whole.

    Yields:
        Rows in their order. Blank lines of a file are skipped.

    Raises:
        DataError: the source cannot be read, has no rows, or a row is not of this form; at the first such row.
        ValueError: `max_rows` is out of range.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be 1 or more, got {max_rows}")
    is_file = is_row_file(source)
    if is_file and name is not None:
        raise DataError(f"{source} is a file: `name` (here {name!r}) is for datasets on the hub, set it to null")
    num_rows = 0
    for row in islice(_read_file(Path(source)) if is_file else _read_hub(source, split, name), max_rows):
        _check_fields(row, fields, kind)
        num_rows += 1
        yield row
    if num_rows == 0:
        raise DataError(f"{source} is empty: it must have at least one row")


def _read_file(path: Path) -> Iterator[Row]:
    if path.is_dir():
        raise DataError(f"dataset file {path} is a directory; name a .jsonl file in it")
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse(line, f"{path.name} line {number}", f"{path} line {number}")
    except FileNotFoundError as error:
        raise DataError(f"dataset file {path} does not exist (looked for {path.absolute()})") from error
    except OSError as error:
        raise DataError(f"dataset file {path} cannot be read: {error.strerror}") from error


def _parse(line: bytes, name: str, place: str) -> Row:
    try:
        values = json.loads(line.rstrip().decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8 (byte {error.start + 1} of the line)") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, or thousands of nested brackets.
        raise DataError(f"{place} is not JSON that can be read: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{place} is {_kind_name(values)}, not an object with named fields")
    return Row(name, values)


def _read_hub(source: str, split: str, name: str | None) -> Iterator[Row]:
    # Importing datasets takes seconds, which runs on local files need not wait for.
    import datasets

    asked = f"split {split!r}" if name is None else f"name {name!r}, split {split!r}"
    try:
        loaded = datasets.load_dataset(source, name, split=split)
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        # In this order: unusable data; missing dataset or no network; unknown name or split; dataset with own code.
        raise DataError(
            f"{source!r} is no existing file, and no dataset of that name ({asked}) could be loaded from the hub: "
            f"{error}"
        ) from error
    for number, values in enumerate(loaded, start=1):
        yield Row(f"{source} {split} row {number}", values)


def _check_fields(row: Row, fields: Sequence[str], kind: type) -> None:
    missing = [field for field in fields if field not in row.values]
    if missing:
        raise DataError(f"{row.name} has no field {', '.join(map(repr, missing))}; it has {_listing(row.values)}")
    for field in fields:
        value = row.values[field]
        if not isinstance(value, kind):
            raise DataError(
                f"{row.name}: field {field!r} is {_kind_name(value)}, must be {_JSON_NAMES[kind]} "
                f"(the row has {_listing(row.values)})"
            )
        if isinstance(value, str):
            check_text(value, f"{row.name}: field {field!r}")


def check_text(text: str, place: str) -> None:
    r"""Refuse text that no tokenizer can encode: JSON escapes can spell half a character (`\ud800`).

    Raises:
        DataError: naming the place.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place} holds half of a surrogate pair at character {error.start + 1}") from error


def _kind_name(value: object) -> str:
    return "null" if value is None else _JSON_NAMES.get(type(value), type(value).__name__)


def _listing(values: Mapping[str, Any]) -> str:
    return f"the fields {', '.join(map(repr, values))}" if values else "no fields"
