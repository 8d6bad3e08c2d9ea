"""Schema text of the Spider databases, from their tables.json."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_jepa.errors import DataError


def read_schemas(path: str) -> dict[str, str]:
    """Read tables.json of Spider.

    Args:
        path: a JSON list with one object per database.

    Returns:
        Schema text by `db_id`: a line `table(column, column)` per table, in the names that queries use, and a line
        `foreign keys: table.column = table.column, ...` if there are any.

    Raises:
        DataError: the file cannot be read or is not of this form.
    """
    file = Path(path)
    try:
        databases = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"tables file {file} does not exist (looked for {file.absolute()})") from error
    except OSError as error:
        raise DataError(f"tables file {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        # Not UTF-8 counts too: UnicodeDecodeError is a ValueError.
        raise DataError(f"tables file {file} is not JSON: {error}") from error
    if not isinstance(databases, list):
        raise DataError(f"tables file {file} must hold a list of databases, not a {type(databases).__name__}")
    schemas = {}
    for number, database in enumerate(databases):
        try:
            schemas[str(database["db_id"])] = _schema_text(database)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DataError(
                f"tables file {file}: database {number} is not of Spider's form ({type(error).__name__}: {error}); it "
                "needs db_id, table_names_original, column_names_original and foreign_keys"
            ) from error
    return schemas


def _schema_text(database: Mapping[str, Any]) -> str:
    tables = database["table_names_original"]
    # The first column is "*", of no table (index -1).
    columns = [(table, column) for table, column in database["column_names_original"]]
    lines = [
        f"{name}({', '.join(column for table, column in columns if table == number)})"
        for number, name in enumerate(tables)
    ]
    keys = [f"{_name(columns[a], tables)} = {_name(columns[b], tables)}" for a, b in database["foreign_keys"]]
    return "\n".join([*lines, f"foreign keys: {', '.join(keys)}"] if keys else lines)


def _name(column: tuple[int, str], tables: list[str]) -> str:
    return f"{tables[column[0]]}.{column[1]}"
