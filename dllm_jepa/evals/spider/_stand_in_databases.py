"""Databases that stand in for Spider's own, which come with its tables.json but are a download of their own."""

import contextlib
import hashlib
import json
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from dllm_jepa.errors import DataError
from dllm_jepa.evals.spider._gold_constants import find_constants
from dllm_jepa.evals.spider._schemas import Schema, read_tables
from dllm_jepa.evals.spider._stand_in_rows import make_rows
from dllm_jepa.files import publish, sync_files, write_durably

_MARKER = "stand_ins.json"
# To be raised whenever other rows are made for the same input.
_VERSION = 1
# Making takes seconds: what is older than that was left by a process that was killed.
_ABANDONED_SECONDS = 3600.0
# Folders that are being made: digits of their digest, and an ending of tempfile.
_UNFINISHED = "[0-9a-f]" * 16 + ".unfinished-*"


def make_stand_ins(tables: Path, directory: Path, *, golds: Mapping[str, Sequence[str]], seed: int = 0) -> Path:
    """Make SQLite databases with made-up rows, on which most gold queries give some.

    Several dozen rows per table; keys hold, and the constants that the gold queries compare columns with occur in
    those columns. The same input gives the same bytes (with one version of SQLite). A score on such databases tells
    right queries from wrong ones most of the time, but is not the score on Spider's own.

    Every input has a folder of its own, which appears when all of it is there and is then left as it is. Any number of
    processes may make the same one at once: the first to finish gives it its name, the others use that.

    Args:
        tables: Spider's tables.json.
        directory: holds the folders; made if it is not there.
        golds: gold queries by `db_id`: the databases to make.
        seed: of the made-up values.

    Returns:
        The folder, `{directory}/{digits of a hash of the input}`, with `{db_id}/{db_id}.sqlite` in it.

    Raises:
        DataError: the tables cannot be read or lack a database, the directory cannot be used, or something else has the
            folder's name.
    """
    schemas = read_tables(tables)
    missing = sorted(set(golds) - set(schemas))
    if missing:
        raise DataError(f"tables file {tables} lacks {len(missing)} databases: {', '.join(missing)}")
    queries = {db_id: sorted(set(golds[db_id])) for db_id in sorted(golds)}
    marker = {"seed": seed, "input": _digest({db_id: schemas[db_id] for db_id in queries}, queries, seed)}
    folder = directory / str(marker["input"])[:16]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(directory)
        if _is_made(folder, marker):
            return folder
        unfinished = Path(tempfile.mkdtemp(prefix=f"{folder.name}.unfinished-", dir=directory))
    except OSError as error:
        raise DataError(f"stand-in databases cannot be made in {directory}: {error.strerror}; name another") from error
    try:
        for db_id, db_queries in queries.items():
            _make_database(unfinished / db_id, schemas[db_id], db_queries, f"{seed}/{db_id}")
        write_durably(unfinished / _MARKER, json.dumps(marker))
        # mkdtemp makes it for its owner alone.
        unfinished.chmod(0o755)
        _give_name(unfinished, folder, marker)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def is_stand_in(directory: Path) -> bool:
    """Whether a directory of databases was made by `make_stand_ins`."""
    return (directory / _MARKER).exists()


def _is_made(folder: Path, marker: Mapping[str, object]) -> bool:
    """Whether the folder of an input is there.

    Raises:
        DataError: it holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found != marker:
        raise DataError(f"stand-in databases cannot be made: {folder} holds something else; remove it")
    return True


def _give_name(unfinished: Path, folder: Path, marker: Mapping[str, object]) -> None:
    try:
        publish(unfinished, folder)
    except OSError:
        # Somebody else was faster.
        if not _is_made(folder, marker):
            raise


def _remove_abandoned(directory: Path) -> None:
    for unfinished in directory.glob(_UNFINISHED):
        # It may get its name, or be removed, at this moment.
        with contextlib.suppress(FileNotFoundError):
            if time.time() - unfinished.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(unfinished, ignore_errors=True)


def _digest(schemas: Mapping[str, Schema], queries: Mapping[str, list[str]], seed: int) -> str:
    described = {
        db_id: [schema.tables, [astuple(column) for column in schema.columns], sorted(schema.primary_key)]
        + [schema.foreign_keys, queries[db_id]]
        for db_id, schema in schemas.items()
    }
    return hashlib.sha256(json.dumps([_VERSION, seed, described]).encode()).hexdigest()


def _make_database(directory: Path, schema: Schema, queries: Sequence[str], seed: str) -> None:
    rows = make_rows(schema, find_constants(schema, queries), seed)
    directory.mkdir()
    path = directory / f"{directory.name}.sqlite"
    connection = sqlite3.connect(path)
    try:
        with connection:
            for table, name in enumerate(schema.tables):
                # SQLite keeps such names for tables of its own; one of Spider's databases lists one.
                if name.lower().startswith("sqlite_"):
                    continue
                connection.execute(_definition(schema, table))
                marks = ", ".join("?" * len(rows[table][0]))
                connection.executemany(f"INSERT INTO {_quoted(name)} VALUES ({marks})", rows[table])
    except (sqlite3.Error, ValueError, OverflowError) as error:
        raise DataError(
            f"a stand-in for database {directory.name!r} cannot be made from its tables: {error}"
        ) from error
    finally:
        connection.close()
    sync_files(directory)


def _definition(schema: Schema, table: int) -> str:
    # Numbers that queries write in quotes become numbers, and the other way round, as in Spider's own databases.
    parts = [
        f"{_quoted(schema.columns[number].name)} "
        f"{'NUMERIC' if schema.columns[number].kind in ('number', 'boolean') else 'TEXT'}"
        for number in schema.columns_of(table)
    ]
    key = ", ".join(_quoted(schema.columns[number].name) for number in schema.key_of(table))
    if key:
        parts.append(f"PRIMARY KEY ({key})")
    return f"CREATE TABLE {_quoted(schema.tables[table])} ({', '.join(parts)})"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
