"""Hostile SQL: nothing is written, nothing escapes, nothing runs over its limits."""

import gc
import hashlib
import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dllm_jepa.errors import DataError
from dllm_jepa.evals.spider import Limits, Sandbox, execute

LIMITS = Limits(seconds=0.15, max_rows=1000, max_result_bytes=1_000_000, max_value_bytes=100_000)
# A query may take its seconds, the grace of the killer, and what a busy machine adds.
LONGEST_SECONDS = LIMITS.seconds + 4.0
# Of the worker: SQLite's heap of 256 MiB, the interpreter and the rows.
MOST_KIB = 400 * 1024

COUNT = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
DOUBLING = "WITH n0 AS (SELECT 1), " + ", ".join(f"n{i} AS (SELECT 1 FROM n{i - 1}, n{i - 1})" for i in range(1, 40))
MANY = ", ".join(f"item AS t{i}" for i in range(30))

WRITES = [
    "DROP TABLE item",
    "DELETE FROM item",
    "UPDATE item SET name = 'z' RETURNING id",
    "CREATE TABLE t AS SELECT * FROM item",
    "CREATE TEMP TRIGGER t AFTER INSERT ON item BEGIN SELECT 1; END",
    "CREATE VIRTUAL TABLE t USING fts5(x)",
    "VACUUM",
    "UPDATE sqlite_master SET sql = ''",
    "UPDATE sqlite_dbpage SET data = zeroblob(4096)",
    "BEGIN EXCLUSIVE",
]

ESCAPES = [
    "ATTACH 'other.sqlite' AS other",
    "VACUUM INTO 'copy.sqlite'",
    "SELECT load_extension('evil.so')",
    "SELECT readfile('/etc/passwd')",
    "SELECT writefile('written', 'x')",
    "SELECT fts3_tokenizer('simple', x'0000000000000000')",
    "PRAGMA query_only = OFF",
    "PRAGMA hard_heap_limit = 0",
    "SELECT * FROM pragma_database_list",
    "SELECT randomblob(10)",
]

NO_QUERY = [
    "",
    "/* nothing */",
    "SELECT",
    "SELECT 1; SELECT 2",
    "SELECT 1; -- x\n DROP TABLE item",
    "SELECT 1\0; DROP TABLE item",
    "SELECT '\ud800'",
    "SELECT ?",
    "SELECT * FROM missing",
]

BOMBS = {
    "endless count": COUNT + "SELECT count(*) FROM n",
    "endless sort of long values": COUNT + "SELECT printf('%.*c', 90000, i) AS x FROM n ORDER BY x",
    "cross join": f"SELECT count(*) FROM {MANY} WHERE t0.id + t29.id > 1000",
    "queries that double": f"{DOUBLING} SELECT count(*) FROM n39",
    "many columns": "SELECT " + ", ".join(["item.*"] * 2_000) + " FROM item",
    "2 GB of zeros": "SELECT zeroblob(2000000000)",
    "text that doubles": "SELECT " + "replace(" * 30 + "'x'" + ", 'x', 'xx')" * 30,
    "pattern": "SELECT printf('%.*c', 90000, 'a') LIKE printf('%.*c', 2000, '%') || 'b'",
    "search in long text": COUNT
    + "SELECT 1 FROM n WHERE instr(i || printf('%.*c', 90000, 'a'), printf('%.*c', 45000, 'a') || 'b')",
    "long list": f"SELECT 1 WHERE 1 IN ({','.join(map(str, range(200_000)))})",
    "json array": "SELECT count(*) FROM json_each('[1,2,3,4,5,6,7,8,9]') a" + ", json_each(a.json)" * 20,
    "too many rows": COUNT + "SELECT i FROM n LIMIT 1001",
    "too many bytes": COUNT + "SELECT printf('%.*c', 90000, 'x') FROM n LIMIT 12",
}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("databases") / "a b?#%41.sqlite"
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT)")
        connection.executemany("INSERT INTO item VALUES (?, ?)", [(i, chr(96 + i)) for i in range(1, 9)])
        connection.execute("CREATE TABLE odd (x)")
        connection.execute("INSERT INTO odd VALUES (CAST(x'61ff62' AS TEXT)), (x'00ff'), (2.5), (9e999), (NULL)")
        connection.execute("INSERT INTO odd VALUES (9223372036854775807), ('\U0001f600')")
    connection.close()
    return path


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(LIMITS)


@pytest.fixture(autouse=True)
def nothing_is_written(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The database keeps its bytes, and no file appears beside it or in the working directory."""
    before = hashlib.sha256(database.read_bytes()).digest()
    monkeypatch.chdir(tmp_path)
    yield
    assert hashlib.sha256(database.read_bytes()).digest() == before
    assert list(database.parent.iterdir()) == [database]
    assert list(tmp_path.iterdir()) == []


def peak_kib(process: subprocess.Popen[str]) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])


def running(sandbox: Sandbox) -> subprocess.Popen[str]:
    assert sandbox._process is not None
    return sandbox._process


def test_what_is_no_query_is_refused(sandbox: Sandbox, database: Path) -> None:
    for sql in [*WRITES, *ESCAPES, *NO_QUERY, "EXPLAIN DROP TABLE item"]:
        result = sandbox.execute(sql, database)
        assert result.rows is None and result.failure, sql
        assert running(sandbox).poll() is None, "a refusal does not end the process"


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_within_their_limits(sandbox: Sandbox, database: Path, name: str) -> None:
    start = time.monotonic()
    result = sandbox.execute(BOMBS[name], database)
    assert time.monotonic() - start < LONGEST_SECONDS
    assert result.rows is None and result.failure
    assert sandbox.execute("SELECT count(*) FROM item", database).rows == [(8,)]
    assert peak_kib(running(sandbox)) < MOST_KIB


QUERIES = [
    ("SELECT 1", [(1,)]),
    ("SELECT 1 -- and no more; DROP TABLE item", [(1,)]),
    ("/* first */ SELECT 1; /* last */", [(1,)]),
    ("VALUES (1, 'a'), (2, NULL)", [(1, "a"), (2, None)]),
    ("WITH t AS (SELECT id FROM item) SELECT count(*) FROM t", [(8,)]),
    ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 3) SELECT i FROM n", [(1,), (2,), (3,)]),
    ('SELECT name FROM item WHERE name = "a"', [("a",)]),
    ("SELECT name FROM item WHERE name LIKE 'A%' OR name GLOB '[b]'", [("a",), ("b",)]),
    ("SELECT max(id), min(id), avg(id), sum(id) FROM item", [(8, 1, 4.5, 36)]),
    ("SELECT row_number() OVER (ORDER BY id DESC) FROM item LIMIT 1", [(1,)]),
    ("SELECT strftime('%Y', '2020-02-03'), cast('7' AS integer), round(1.25, 1)", [("2020", 7, 1.3)]),
    (
        "SELECT x FROM odd",
        [("ab",), (b"\x00\xff",), (2.5,), (float("inf"),), (None,), (2**63 - 1,), ("\U0001f600",)],
    ),
    ("SELECT 1 WHERE 0", []),
]


def test_queries_give_their_rows(sandbox: Sandbox, database: Path) -> None:
    for sql, rows in QUERIES:
        result = sandbox.execute(sql, database)
        assert (result.rows, result.failure) == (rows, ""), sql
        assert [list(map(type, row)) for row in result.rows or []] == [list(map(type, row)) for row in rows]
    assert sandbox.execute("EXPLAIN QUERY PLAN SELECT * FROM item", database).rows


def test_limits_are_met_exactly(database: Path) -> None:
    sandbox = Sandbox(Limits(seconds=30, max_rows=8, max_result_bytes=64, max_value_bytes=100))
    assert len(sandbox.execute("SELECT id FROM item", database).rows or []) == 8
    assert "8 rows" in sandbox.execute("SELECT id FROM item UNION ALL SELECT 9", database).failure
    assert "64 bytes" in sandbox.execute("SELECT id, name FROM item", database).failure
    assert sandbox.execute("SELECT length(printf('%.*c', 100, 'x'))", database).rows == [(100,)]
    assert "too big" in sandbox.execute("SELECT length(printf('%.*c', 101, 'x'))", database).failure


def test_reasons_say_what_was_wrong(sandbox: Sandbox, database: Path) -> None:
    for sql, failure in [
        ("SELECT * FROM missing", "no such table: missing"),
        ("DROP TABLE item", "not authorized"),
        ("", "is no query"),
        (BOMBS["endless count"], "runs longer than 0.15 seconds"),
        (BOMBS["too many rows"], "has more than 1000 rows"),
    ]:
        assert sandbox.execute(sql, database).failure == failure
    assert execute("SELECT 1, 'a'", database) == sandbox.execute("SELECT 1, 'a'", database)
    with pytest.raises(ValueError, match="max_rows must be positive, got 0"):
        Limits(max_rows=0)


def test_the_worker_stops_by_itself_where_memory_runs_out(database: Path) -> None:
    sandbox = Sandbox(Limits(seconds=60))
    assert sandbox.execute(BOMBS["queries that double"], database).failure == "needs too much memory"
    assert running(sandbox).poll() is None


def test_the_worker_has_limits_of_its_own(sandbox: Sandbox, database: Path) -> None:
    sandbox.execute("SELECT 1", database)
    lines = Path(f"/proc/{running(sandbox).pid}/limits").read_text().splitlines()
    limits = {line[:26].strip(): line[26:].split()[:2] for line in lines}
    assert limits["Max file size"] == limits["Max core file size"] == ["0", "0"]
    assert int(limits["Max address space"][1]) <= 2 << 30


def test_a_worker_that_does_not_look_at_the_clock_is_killed_and_replaced(database: Path) -> None:
    sandbox = Sandbox(LIMITS)
    sandbox.execute("SELECT 1", database)
    stopped = running(sandbox)
    os.kill(stopped.pid, signal.SIGSTOP)
    assert sandbox.execute("SELECT 1", database).failure == "runs longer than 0.15 seconds"
    assert stopped.returncode == -signal.SIGKILL
    assert sandbox.execute("SELECT 2", database).rows == [(2,)]


def test_a_worker_that_dies_costs_one_query_at_most(database: Path) -> None:
    sandbox = Sandbox(Limits(seconds=30))
    sandbox.execute("SELECT 1", database)
    dead = running(sandbox)
    dead.kill()
    dead.wait()
    assert sandbox.execute("SELECT 2", database).rows == [(2,)]
    threading.Timer(0.2, running(sandbox).kill).start()
    assert sandbox.execute(BOMBS["endless count"], database).failure == "ends its process"
    assert sandbox.execute("SELECT 3", database).rows == [(3,)]


def test_a_worker_that_is_killed_just_after_its_answer_is_not_asked_again(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LateTimer:
        """Fires when it is cancelled: between the answer and the next query."""

        daemon = False

        def __init__(self, seconds: float, kill: Callable[[], None]) -> None:
            self.cancel = kill

        def start(self) -> None: ...

        def join(self) -> None: ...

    sandbox = Sandbox(Limits(seconds=30))
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Timer", LateTimer)
        assert [sandbox.execute(f"SELECT {number}", database).rows for number in range(5)] == [[(n,)] for n in range(5)]


def test_an_interrupted_query_leaves_no_answer_for_the_next(database: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    sandbox = Sandbox(Limits(seconds=30))
    sandbox.execute("SELECT 1", database)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            sandbox.execute(BOMBS["endless count"], database)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert sandbox.execute("SELECT 4", database).rows == [(4,)]


def test_the_worker_ends_with_its_sandbox(database: Path) -> None:
    sandbox = Sandbox(LIMITS)
    sandbox.execute("SELECT 1", database)
    process = running(sandbox)
    assert process.poll() is None
    del sandbox
    gc.collect()
    assert process.poll() is not None


def test_a_missing_or_damaged_database_is_named(sandbox: Sandbox, database: Path, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("damaged") / "world_1.sqlite"
    with pytest.raises(DataError, match=r"world_1\.sqlite does not exist"):
        sandbox.execute("SELECT 1", path)
    assert not path.exists()
    content = database.read_bytes()
    for damaged in (b"", b"no database", b"SQLite format 3\0" + b"\xff" * 5000, content[:4096] + b"\xff" * 4096):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"world_1\.sqlite cannot be read"):
            sandbox.execute("SELECT * FROM item", path)
