"""Two evaluations on the same items, item by item."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_jepa.errors import CheckpointError, DataError
from dllm_jepa.evals._results import GENERATIONS_NAME, SCORES_NAME, differences
from dllm_jepa.evals._statistics import bootstrap_interval, mcnemar, newcombe_interval
from dllm_jepa.evals._summary import aligned, is_measure, number, percent, values_of

# Of the fingerprints: what must be the same, and what a comparison is about.
_IDENTITY = ("task", "data_sha256")
_COMPARED = ("model", "part")
_NUM_NAMED_ITEMS = 5


@dataclass(frozen=True)
class PairedMeasure:
    """A measure on the items to which it applies in both evaluations, A and B.

    Args:
        n: these items.
        interval: 95 % interval of the difference: Newcombe's for shares, bootstrap over items for means.
        both: items that are True in both; None for a measure that is a number, as are the next three.
        only_a: items that are True in A only.
        only_b: items that are True in B only.
        p_value: of McNemar's exact test, two-sided.
    """

    n: int
    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    both: int | None = None
    only_a: int | None = None
    only_b: int | None = None
    p_value: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Two evaluations side by side.

    Args:
        measures: by name; those that both have and that apply to some item in both.
        warnings: what else is different between them and may be the cause, one line each.
    """

    a: Path
    b: Path
    task: str
    num_items: int
    measures: Mapping[str, PairedMeasure]
    warnings: Sequence[str]

    def __str__(self) -> str:
        """Text for a terminal."""
        lines = [f"{self.task}, {self.num_items:,} items; A: {self.a}, B: {self.b}", "", paired_table(self.measures)]
        if self.warnings:
            lines += ["", "The two differ in more than the model; compare them only if that is meant:"]
            lines += [f"  {warning}" for warning in self.warnings]
        return "\n".join(lines)


def compare(a: str | Path, b: str | Path) -> Comparison:
    """Compare two finished evaluations of one task on the same items.

    Args:
        a: folder of the first one, such as that of the base model.
        b: folder of the second one.

    Raises:
        CheckpointError: a folder does not hold a finished evaluation.
        DataError: the evaluations are not of the same items, or a file is damaged.
    """
    folders = Path(a), Path(b)
    (fingerprint_a, rows_a), (fingerprint_b, rows_b) = map(_read, folders)
    _check_same("task", folders, fingerprint_a, fingerprint_b)
    _check_same_items(folders, rows_a, rows_b)
    _check_same("data_sha256", folders, fingerprint_a, fingerprint_b)
    measures = paired_measures(rows_a, rows_b)
    names_a, names_b = ({name for row in rows for name in row["measures"]} for rows in (rows_a, rows_b))
    warnings = [f"measure {name}: in one of the two only" for name in sorted(names_a ^ names_b)]
    settings_a, settings_b = (
        {key: value for key, value in fingerprint.items() if key not in _COMPARED}
        for fingerprint in (fingerprint_a, fingerprint_b)
    )
    for key, (of_a, of_b) in differences(settings_a, settings_b).items():
        warnings.append(f"{key}: {json.dumps(of_a)} in A, {json.dumps(of_b)} in B")
    return Comparison(*folders, str(fingerprint_a["task"]), len(rows_a), measures, warnings)


def paired_measures(
    rows_a: Sequence[Mapping[str, Any]], rows_b: Sequence[Mapping[str, Any]]
) -> dict[str, PairedMeasure]:
    """The measures that evaluations of the same items share, by name; without those that apply to no item in both."""
    names = dict.fromkeys(name for row in rows_a for name in row["measures"])
    shared = {name for row in rows_b for name in row["measures"]}
    paired = {}
    for name in names:
        of_a, of_b = values_of(name, rows_a), values_of(name, rows_b)
        pairs = [(x, y) for x, y in zip(of_a, of_b, strict=True) if x is not None and y is not None]
        if name in shared and pairs:
            paired[name] = _pair(name, pairs)
    return paired


def _pair(name: str, pairs: Sequence[tuple[bool | float, bool | float]]) -> PairedMeasure:
    of_a, of_b = zip(*pairs, strict=True)
    n = len(pairs)
    if isinstance(of_a[0], bool) != isinstance(of_b[0], bool):
        raise DataError(f"measure {name!r} is true or false in one evaluation and a number in the other")
    a, b = math.fsum(of_a) / n, math.fsum(of_b) / n
    if not isinstance(of_a[0], bool):
        changes = [y - x for x, y in pairs]
        return PairedMeasure(n, a, b, math.fsum(changes) / n, bootstrap_interval(changes))
    both, only_a, only_b = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True)))
    interval = newcombe_interval(both, only_a, only_b, n - both - only_a - only_b)
    return PairedMeasure(n, a, b, (only_b - only_a) / n, interval, both, only_a, only_b, mcnemar(only_a, only_b))


def paired_table(measures: Mapping[str, PairedMeasure]) -> str:
    """Paired measures as text, one line each."""
    rows = [["measure", "items", "A", "B", "B - A", "95 % interval", "both", "only A", "only B", "p"]]
    for name, pair in measures.items():
        show = number if pair.p_value is None else percent
        signed = [("+" if value > 0 else "") + show(value) for value in (pair.difference, *pair.interval)]
        counts = ["-" if count is None else f"{count:,}" for count in (pair.both, pair.only_a, pair.only_b)]
        p = "-" if pair.p_value is None else f"{pair.p_value:.3g}"
        row = [name, f"{pair.n:,}", show(pair.a), show(pair.b), signed[0], f"{signed[1]} to {signed[2]}", *counts, p]
        rows.append(row)
    return aligned(rows)


def _read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Fingerprint and rows of a finished evaluation."""
    scores_path, generations_path = folder / SCORES_NAME, folder / GENERATIONS_NAME
    scores = _read_scores(scores_path)
    rows = _read_generations(generations_path)
    if len(rows) != scores["num_items"]:
        raise DataError(
            f"{generations_path} is damaged: it has {len(rows):,} items, {scores['num_items']:,} by {scores_path}"
        )
    return scores["facts"], rows


def _read_scores(path: Path) -> dict[str, Any]:
    folder = path.parent
    try:
        scores = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a directory (looked for {folder.absolute()})") from error
        raise CheckpointError(
            f"{folder} has no {SCORES_NAME}: the evaluation is not finished, or the folder is not one of an "
            "evaluation; run it again with resume=auto to finish it"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        # Not UTF-8 counts too: UnicodeDecodeError is a ValueError.
        raise DataError(f"{path} is damaged: {error}") from error
    fingerprint = scores.get("facts") if isinstance(scores, dict) else None
    if not isinstance(fingerprint, dict) or any(not isinstance(fingerprint.get(key), str) for key in _IDENTITY):
        raise DataError(f"{path} has no facts with {' and '.join(_IDENTITY)}: it is not of an evaluation, or damaged")
    if type(scores.get("num_items")) is not int:
        raise DataError(f"{path} has no num_items: it is not of an evaluation, or damaged")
    return dict(scores)


def _read_generations(path: Path) -> list[dict[str, Any]]:
    """The lines of generations.jsonl, in the order of their items."""
    rows: dict[int, dict[str, Any]] = {}
    try:
        with path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                row = _parse(line, f"{path} line {line_number}")
                if row["item"] in rows:
                    raise DataError(f"{path} line {line_number}: item {row['item']} is there twice")
                rows[row["item"]] = row
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; the evaluation is not complete") from error
    if not rows:
        raise DataError(f"{path} has no items")
    return [rows[item] for item in sorted(rows)]


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is damaged: {error}") from error
    kinds = {"item": int, "name": str, "measures": dict}
    if not isinstance(row, dict) or any(type(row.get(field)) is not kind for field, kind in kinds.items()):
        raise DataError(f"{place} is not a result: it must be an object with the fields item, name and measures")
    for name, value in row["measures"].items():
        if not is_measure(value):
            raise DataError(f"{place}: measure {name!r} is {value!r}; it must be true, false, null or a finite number")
    return row


def _check_same(
    key: str, folders: tuple[Path, Path], fingerprint_a: Mapping[str, Any], fingerprint_b: Mapping[str, Any]
) -> None:
    if fingerprint_a[key] != fingerprint_b[key]:
        raise DataError(
            f"{folders[0]} and {folders[1]} cannot be compared item by item: {key} is {fingerprint_a[key]!r} in the "
            f"first one and {fingerprint_b[key]!r} in the second"
        )


def _check_same_items(
    folders: tuple[Path, Path], rows_a: Sequence[Mapping[str, Any]], rows_b: Sequence[Mapping[str, Any]]
) -> None:
    items_a, items_b = ({row["item"] for row in rows} for rows in (rows_a, rows_b))
    lonely = sorted(items_a ^ items_b)
    if lonely:
        named = ", ".join(map(str, lonely[:_NUM_NAMED_ITEMS])) + (", ..." if len(lonely) > _NUM_NAMED_ITEMS else "")
        raise DataError(
            f"{folders[0]} and {folders[1]} have different items ({len(items_a):,} and {len(items_b):,}): {named} "
            f"{'is' if len(lonely) == 1 else 'are'} in one of them only; evaluate both with the same max_items"
        )
