"""Running SQL that a model wrote."""

import contextlib
import json
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dllm_jepa.errors import DataError

Value = None | int | float | str | bytes

# How long the worker may go on after its own clock should have stopped it.
_GRACE_SECONDS = 1.0


@dataclass(frozen=True)
class Limits:
    """What one query may use.

    Args:
        seconds: time on the clock.
        max_rows: rows of the result.
        max_result_bytes: bytes of all values of the result; a number counts as 8.
        max_value_bytes: bytes of any value or row on the way, and of a row of the database.
    """

    seconds: float = 30.0
    max_rows: int = 100_000
    max_result_bytes: int = 32 << 20
    max_value_bytes: int = 1_000_000

    def __post_init__(self) -> None:
        """Check that all are positive."""
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")


@dataclass(frozen=True)
class Result:
    """The rows of a query, or why it failed, in a few words."""

    rows: list[tuple[Value, ...]] | None
    failure: str = ""


class Sandbox:
    """Runs queries one at a time, in a process of its own that only reads.

    The database is opened read-only and immutable; SQLite lets a statement do nothing but select, call harmless
    functions and recurse; one statement is allowed; time, memory, lengths and rows are limited. Not all of SQLite
    looks at the clock (it may expand a query of a few lines to gigabytes before its first step), so the process has
    limits of its own, can write no file, and is killed if it does not answer in time; the next query gets a new one.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        """Nothing is started before the first query."""
        self.limits = limits or Limits()
        self._process: subprocess.Popen[str] | None = None
        self._end_worker: Callable[[], object] = lambda: None

    def execute(self, sql: str, database: Path) -> Result:
        """Run a query, which may be anything at all, on a SQLite file.

        Raises:
            DataError: the database is missing or damaged.
            RuntimeError: the process that runs the queries does not start.
        """
        if not database.is_file():
            raise DataError(f"database {database} does not exist (looked for {database.absolute()})")
        uri = f"{database.absolute().as_uri()}?mode=ro&immutable=1"
        start = time.monotonic()
        answer = self._ask({"sql": sql, "uri": uri, **asdict(self.limits)})
        if answer is None:
            is_late = time.monotonic() - start >= self.limits.seconds
            return Result(None, f"runs longer than {self.limits.seconds:g} seconds" if is_late else "ends its process")
        if "damage" in answer:
            raise DataError(f"database {database} cannot be read: {answer['damage']}; it must be a file of SQLite")
        if "failure" in answer:
            return Result(None, answer["failure"])
        # A blob comes as a list with its digits in base 16.
        rows = [
            [bytes.fromhex(value[0]) if isinstance(value, list) else value for value in row] for row in answer["rows"]
        ]
        return Result([tuple(row) for row in rows])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The worker's answer; None if it had to be killed or died."""
        process = self._worker()
        assert process.stdin is not None and process.stdout is not None, "the worker is started with pipes"
        killed = threading.Event()

        def kill() -> None:
            killed.set()
            process.kill()

        killer = threading.Timer(self.limits.seconds + _GRACE_SECONDS, kill)
        killer.daemon = True
        killer.start()
        line = ""
        try:
            print(json.dumps(request), file=process.stdin, flush=True)
            line = process.stdout.readline()
        except BrokenPipeError:
            pass
        finally:
            killer.cancel()
            killer.join()  # it may be killing right now, after the answer
            # An answer that was not read, because of Ctrl-C say, must not be taken for that of the next query.
            if killed.is_set() or not line.endswith("\n"):
                self._end_worker()
        answer: dict[str, Any] | None = json.loads(line) if line.endswith("\n") else None
        return answer

    def _worker(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        script = Path(__file__).with_name("_sandbox_worker.py")
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="ascii",
        )
        self._end_worker = weakref.finalize(self, _end, process)
        assert process.stdout is not None, "the worker is started with pipes"
        if process.stdout.readline() != "ready\n":
            self._end_worker()
            raise RuntimeError(f"the process for SQL ({sys.executable} {script}) does not start; see above")
        self._process = process
        return process


def execute(sql: str, database: Path, limits: Limits | None = None) -> Result:
    """Run one query in a `Sandbox` of its own; arguments and errors as there. For many, keep a sandbox."""
    return Sandbox(limits).execute(sql, database)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    # Closing a pipe writes what is left in its buffer, which nobody reads any more.
    with contextlib.suppress(BrokenPipeError), process:
        pass
