"""What Spider's tables.json says of a database: tables, columns with their types, keys."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_jepa.errors import DataError


@dataclass(frozen=True)
class Column:
    """A column.

    Args:
        table: number of its table.
        name: as in queries.
        kind: `text`, `number`, `time`, `boolean` or `others`.
    """

    table: int
    name: str
    kind: str


@dataclass(frozen=True)
class Schema:
    """A database; tables and columns are numbered from 0 in their order in the file.

    Args:
        tables: names of the tables.
        columns: all columns, those of a table in their order.
        primary_key: columns of primary keys; several of one table make one key.
        foreign_keys: pairs of columns; the values of the first are among those of the second.
    """

    tables: tuple[str, ...]
    columns: tuple[Column, ...]
    primary_key: frozenset[int]
    foreign_keys: tuple[tuple[int, int], ...]

    def columns_of(self, table: int) -> Iterator[int]:
        """Numbers of the columns of a table."""
        return (number for number, column in enumerate(self.columns) if column.table == table)

    def key_of(self, table: int) -> list[int]:
        """The columns of a table's primary key."""
        return [number for number in self.columns_of(table) if number in self.primary_key]


def read_tables(path: Path) -> dict[str, Schema]:
    """Read tables.json of Spider.

    Returns:
        Schemas by `db_id`.

    Raises:
        DataError: the file cannot be read or is not of this form.
    """
    try:
        databases = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"tables file {path.absolute()} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"tables file {path} is not JSON: {error}") from error
    if not isinstance(databases, list):
        raise DataError(f"tables file {path} must hold a list of databases, not a {type(databases).__name__}")
    schemas: dict[str, Schema] = {}
    for number, database in enumerate(databases):
        try:
            db_id, schema = check_db_id(database["db_id"]), _schema(database)
            if db_id in schemas:
                raise ValueError(f"db_id {db_id!r} was there before")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"tables file {path}: database {number} is not of Spider's form ({type(error).__name__}: {error}); it "
                "needs db_id, table_names_original, column_names_original, column_types, primary_keys and foreign_keys"
            ) from error
        schemas[db_id] = schema
    return schemas


def check_db_id(db_id: object) -> str:
    """A `db_id` as it is, if a directory inside another one may have that name.

    Raises:
        ValueError: it may not: the name is empty, leads elsewhere, or is no text.
    """
    if not isinstance(db_id, str) or db_id in ("", ".", "..") or Path(db_id).name != db_id or "\0" in db_id:
        raise ValueError(f"db_id {db_id!r} must be the name of a directory")
    return db_id


def _schema(database: Mapping[str, Any]) -> Schema:
    tables = tuple(_names(database["table_names_original"], "tables"))
    # The first column is "*", of no table; the numbers of keys count it.
    columns = [
        Column(table, name, kind)
        for (table, name), kind in zip(database["column_names_original"][1:], database["column_types"][1:], strict=True)
    ]
    for number, table in enumerate(tables):
        if not _names([column.name for column in columns if column.table == number], f"columns of {table!r}"):
            raise ValueError(f"table {table!r} has no columns")
    if {column.table for column in columns} != set(range(len(tables))):
        raise ValueError("a column is of no table")
    keys = [number for key in database["primary_keys"] for number in (key if isinstance(key, list) else [key])]
    pairs = [(child, parent) for child, parent in database["foreign_keys"]]
    for number in (*keys, *(number for pair in pairs for number in pair)):
        if not 1 <= number <= len(columns):
            raise IndexError(f"a key names column {number}; there are 1 to {len(columns)}")
    return Schema(
        tables,
        tuple(columns),
        frozenset(number - 1 for number in keys),
        tuple((child - 1, parent - 1) for child, parent in pairs),
    )


def _names(names: list[str], what: str) -> list[str]:
    if not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"the names of {what} must be text")
    # SQLite compares names without regard to case.
    if len({name.lower() for name in names}) != len(names):
        raise ValueError(f"two {what} have one name")
    return names
