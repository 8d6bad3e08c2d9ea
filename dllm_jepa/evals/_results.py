"""The folder of an evaluation: finished batches are kept as they come, so that nothing is evaluated twice.

output_dir/
    facts.json         the fingerprint of the evaluation
    parts/00000.jsonl  while it runs: a line per finished batch, a file per rank
    generations.jsonl  at the end: an object per item, in the order of the items
    scores.json        at the end: scores with intervals, fingerprint (`facts`) and settings
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_jepa.errors import DataError, LaunchError
from dllm_jepa.evals._task import ItemResult
from dllm_jepa.files import write_atomically

GENERATIONS_NAME = "generations.jsonl"
SCORES_NAME = "scores.json"
_FINGERPRINT_NAME = "facts.json"
_PARTS_NAME = "parts"
_RUN_STATUS_NAME = "status.json"  # of a training run
_POLL_SECONDS = 0.5


class ResultsFolder:
    """Results of an evaluation, on disk batch by batch."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.generations = path / GENERATIONS_NAME
        self.scores = path / SCORES_NAME
        self._parts = path / _PARTS_NAME

    def open(self, fingerprint: Mapping[str, Any], *, resume: bool) -> set[int]:
        """Take the folder into use, on one rank and before any other one writes.

        Args:
            fingerprint: what identifies this evaluation (JSON values).
            resume: whether to go on with what is there.

        Returns:
            The batches that are finished, of an evaluation that is not finished as a whole.

        Raises:
            LaunchError: it holds an evaluation and `resume` does not ask to go on with it, or that was another one, or
                it cannot be written.
        """
        held = self._held_fingerprint()
        if held is None and (self.path / _RUN_STATUS_NAME).exists():
            raise LaunchError(f"{self.path} is the output_dir of a training run: choose another one, such as its eval/")
        if held is None and (left := [file for file in (self.scores, self.generations) if file.exists()]):
            raise LaunchError(
                f"{left[0]} is there without its {_FINGERPRINT_NAME}: choose another output_dir, or move it away"
            )
        if held is not None and not resume:
            raise LaunchError(
                f"{self.path} already holds an evaluation; nothing is overwritten: choose another output_dir, or go on "
                "with it by resume=auto"
            )
        if held is not None and (found := differences(held, json.loads(json.dumps(fingerprint)))):
            lines = [f"{key}: {json.dumps(then)} there, {json.dumps(now)} now" for key, (then, now) in found.items()]
            raise LaunchError(
                f"{self.path} holds another evaluation, and the two are not mixed; choose another output_dir. They "
                "differ in\n  " + "\n  ".join(lines)
            )
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
            if held is None:
                write_atomically(self.path / _FINGERPRINT_NAME, json.dumps(fingerprint, indent=2) + "\n")
        except OSError as error:
            raise LaunchError(f"output_dir={self.path} cannot be written: {error}") from None
        return self._finished()

    def wait(self, num_batches: int) -> None:
        """Wait until the batches of all ranks, `num_batches` together, are written.

        It looks at the files, since a collective would give up on a rank that takes much longer than the others.
        """
        while not self.is_finished and len(self._finished()) < num_batches:
            time.sleep(_POLL_SECONDS)

    @property
    def is_finished(self) -> bool:
        """Whether all of it is done."""
        return self.scores.exists()

    def append(self, rank: int, batch: int, results: Sequence[ItemResult], seconds: float) -> None:
        """Keep a finished batch, and how long it took; once this returns it is never evaluated again.

        Each rank writes a file of its own.
        """
        record = {"batch": batch, "seconds": seconds, "rows": [result.to_json() for result in results]}
        with (self._parts / f"{rank:05d}.jsonl").open("ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a line that was cut off when the process was killed
                    file.write(b"\n")
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def merge(self, num_items: int) -> tuple[list[dict[str, Any]], float]:
        """Write generations.jsonl from all parts, on one rank and after the last one has written.

        Returns:
            The rows in the order of the items, and the seconds of all batches together.

        Raises:
            DataError: the results of some items are not there.
        """
        if self.is_finished:
            rows = [json.loads(line) for line in self.generations.read_text(encoding="utf-8").splitlines()]
            return rows, float(json.loads(self.scores.read_text(encoding="utf-8"))["seconds"])
        # A batch that two ranks have done, of whom one was killed, counts once.
        records = {record["batch"]: record for record in self._records()}
        rows = sorted((row for record in records.values() for row in record["rows"]), key=lambda row: row["item"])
        if [row["item"] for row in rows] != list(range(num_items)):
            raise DataError(f"{self._parts} has {len(rows)} of {num_items} items: start again with resume=auto")
        write_atomically(self.generations, "".join(json.dumps(row) + "\n" for row in rows))
        return rows, sum(record["seconds"] for record in records.values())

    def finish(self, scores: Mapping[str, Any]) -> None:
        """Write scores.json; a folder with this file is complete."""
        write_atomically(self.scores, json.dumps(scores, indent=2) + "\n")
        shutil.rmtree(self._parts, ignore_errors=True)

    def _held_fingerprint(self) -> dict[str, Any] | None:
        file = self.path / _FINGERPRINT_NAME
        try:
            held = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
        except (OSError, ValueError) as error:
            raise LaunchError(f"{file} cannot be read: {error}; choose another output_dir") from None
        if not isinstance(held, dict | None):
            raise LaunchError(f"{file} cannot be read: it holds no JSON object; choose another output_dir")
        return held

    def _finished(self) -> set[int]:
        return {record["batch"] for record in self._records()}

    def _records(self) -> Iterator[dict[str, Any]]:
        """The finished batches of all parts."""
        for part in sorted(self._parts.glob("*.jsonl")):
            try:
                lines = part.read_bytes().splitlines()
            except FileNotFoundError:
                continue  # another rank has finished the evaluation meanwhile
            for line in lines:
                try:
                    yield json.loads(line)
                except ValueError:
                    continue  # cut off when the process was killed: that batch is not finished


def differences(a: Mapping[str, Any], b: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """What differs between two fingerprints: both values by dotted name, None for one that is missing."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in dict.fromkeys([*a, *b]):
        of_a, of_b = a.get(key), b.get(key)
        if isinstance(of_a, dict) and isinstance(of_b, dict):
            found |= differences(of_a, of_b, f"{prefix}{key}.")
        elif of_a != of_b:
            found[f"{prefix}{key}"] = (of_a, of_b)
    return found
