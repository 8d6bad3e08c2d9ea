"""Runs SQL of strangers: a script with the standard library alone, in a process that may be killed at any moment.

It reads one request per line and answers each with one line, both JSON; `_sandbox` is the other side.
"""

import json
import resource
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from typing import Any

# Of SQLite's allocator; of the whole process. The first gives a query an error where the second would end the worker.
_HEAP_BYTES = 256 << 20
_PROCESS_BYTES = 2 << 30

_OPERATIONS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    sqlite3.SQLITE_RECURSIVE,
}

# All that neither reads nor writes a file, loads code or tells of the process.
_FUNCTIONS = frozenset(
    """
    abs avg char coalesce concat concat_ws count format glob group_concat hex ifnull iif instr length like likelihood
    likely lower ltrim max min nullif octet_length printf quote random replace round rtrim sign soundex string_agg
    substr substring sum total trim typeof unhex unicode unlikely upper
    current_date current_time current_timestamp date datetime julianday strftime time timediff unixepoch
    acos acosh asin asinh atan atan2 atanh ceil ceiling cos cosh degrees exp floor ln log log10 log2 mod pi pow power
    radians sin sinh sqrt tan tanh trunc
    cume_dist dense_rank first_value lag last_value lead nth_value ntile percent_rank rank row_number
    json json_array json_array_length json_extract json_group_array json_group_object json_object json_quote json_type
    json_valid -> ->>
    """.split()
)

_LIMITS = {
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 100_000,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 1_000,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 1_000_000,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}

# Opcodes between two looks at the clock, well below a millisecond of cheap ones.
_OPCODES = 1_000

_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class _DamagedDatabase(Exception):
    """The file is at fault, whatever the query."""


class _Refused(Exception):
    """The query went over a limit of ours."""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run one query.

    Returns:
        `rows`, where a blob is a list with its digits in base 16; or `failure`, why there are none; or `damage`, what
        is wrong with the database.
    """
    deadline = time.monotonic() + request["seconds"]
    try:
        connection = _connect(request["uri"])
        try:
            _confine(connection, request["max_value_bytes"], deadline)
            return {"rows": _rows(connection, request)}
        finally:
            connection.close()
    except _DamagedDatabase as error:
        return {"damage": str(error)}
    except MemoryError:
        return {"failure": "needs too much memory"}
    # Of the sqlite3 module: errors of SQLite; more than one statement; NUL or half a character in the text.
    except (_Refused, sqlite3.Error, sqlite3.Warning, ValueError) as error:
        if getattr(error, "sqlite_errorcode", None) in _DAMAGE:
            return {"damage": str(error)}
        if time.monotonic() >= deadline:
            return {"failure": f"runs longer than {request['seconds']:g} seconds"}
        return {"failure": str(error)}


def _connect(uri: str) -> sqlite3.Connection:
    try:
        connection = sqlite3.connect(uri, uri=True)
        has_tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    except sqlite3.Error as error:
        raise _DamagedDatabase(str(error)) from error
    if not has_tables:
        raise _DamagedDatabase("it has no tables")
    return connection


def _confine(connection: sqlite3.Connection, max_value_bytes: int, deadline: float) -> None:
    """Take every right from a connection but that to compute rows, for a while."""
    # Sorting and temporary tables stay in the memory that the heap limit counts.
    for setting in ("temp_store = MEMORY", "query_only = ON", "trusted_schema = OFF", "cell_size_check = ON"):
        connection.execute(f"PRAGMA {setting}")
    connection.execute(f"PRAGMA hard_heap_limit = {_HEAP_BYTES}")
    for limit, value in {**_LIMITS, sqlite3.SQLITE_LIMIT_LENGTH: max_value_bytes}.items():
        connection.setlimit(limit, value)
    connection.text_factory = lambda text: text.decode("utf-8", errors="ignore")
    connection.set_progress_handler(lambda: time.monotonic() >= deadline, _OPCODES)
    connection.set_authorizer(_authorise)


def _authorise(operation: int, _name: str | None, function: str | None, *_where: str | None) -> int:
    is_known = operation != sqlite3.SQLITE_FUNCTION or (function or "").lower() in _FUNCTIONS
    return sqlite3.SQLITE_OK if operation in _OPERATIONS and is_known else sqlite3.SQLITE_DENY


def _rows(connection: sqlite3.Connection, request: dict[str, Any]) -> list[list[Any]]:
    cursor = connection.execute(request["sql"])
    if cursor.description is None:
        raise _Refused("is no query")
    rows: list[list[Any]] = []
    size = 0
    for row in cursor:
        # A number or None counts as 8 bytes.
        size += sum(len(value) if isinstance(value, str | bytes) else 8 for value in row)
        if len(rows) == request["max_rows"]:
            raise _Refused(f"has more than {request['max_rows']} rows")
        if size > request["max_result_bytes"]:
            raise _Refused(f"has more than {request['max_result_bytes']} bytes of rows")
        rows.append([[value.hex()] if isinstance(value, bytes) else value for value in row])
    return rows


def _lower(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def _serve(write: Callable[[str], object]) -> None:
    # Ctrl-C is for the process that asks; this one ends with its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _lower(resource.RLIMIT_AS, _PROCESS_BYTES)
    _lower(resource.RLIMIT_CORE, 0)
    # No regular file can grow, whatever else were to fail.
    _lower(resource.RLIMIT_FSIZE, 0)
    write("ready")
    for line in sys.stdin:
        write(json.dumps(answer(json.loads(line))))


if __name__ == "__main__":
    _serve(lambda text: print(text, flush=True))
