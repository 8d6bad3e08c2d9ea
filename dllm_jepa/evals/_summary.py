"""From the results of the items to the scores of an evaluation."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dllm_jepa.errors import DataError
from dllm_jepa.evals._statistics import bootstrap_interval, wilson_interval


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Scores of the lines of generations.jsonl, with their number of items and 95 % intervals.

    Returns:
        By the name of the measure, in the order of the rows: of True and False `score` (the share of True), `n`,
        `correct` and `interval` (Wilson's); of numbers `mean`, `n` and `interval` (bootstrap over items). Items to
        which a measure does not apply do not count; one that applies to none has only `n`, which is 0.

    Raises:
        DataError: a measure is no finite number, or for some items True or False and for others a number.
    """
    names = dict.fromkeys(name for row in rows for name in row["measures"])
    return {name: _summarize(name, rows) for name in names}


def is_measure(value: object) -> bool:
    """Whether a value can stand for a measure: True or False, a finite number, or None."""
    # An int of hundreds of digits has no float, and isfinite would raise.
    return (
        value is None
        or (isinstance(value, int) and abs(value) < 2**63)
        or (isinstance(value, float) and math.isfinite(value))
    )


def values_of(name: str, rows: Sequence[Mapping[str, Any]]) -> list[bool | float | None]:
    """A measure of all items, None where it does not apply."""
    values = [row["measures"].get(name) for row in rows]
    for row, value in zip(rows, values, strict=True):
        if not is_measure(value):
            raise DataError(f"measure {name!r} of item {row['item']} ({row['name']}) is {value!r}, not a finite number")
    if len({isinstance(value, bool) for value in values if value is not None}) > 1:
        raise DataError(f"measure {name!r} is true or false for some items and a number for others")
    return values


def _summarize(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = [value for value in values_of(name, rows) if value is not None]
    if not values:
        return {"n": 0}
    if isinstance(values[0], bool):
        correct = sum(map(bool, values))
        interval = wilson_interval(correct, len(values))
        return {"score": correct / len(values), "n": len(values), "correct": correct, "interval": list(interval)}
    mean = math.fsum(values) / len(values)
    return {"mean": mean, "n": len(values), "interval": list(bootstrap_interval(values))}


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """The result of `summarize` as text, one line per measure."""
    rows = [["measure", "score", "95 % interval", "items"]]
    for name, measure in summary.items():
        show = percent if "score" in measure else number
        value = measure.get("score", measure.get("mean"))
        interval = "-" if value is None else " to ".join(map(show, measure["interval"]))
        rows.append([name, "-" if value is None else show(value), interval, f"{measure['n']:,}"])
    return aligned(rows)


def remark_lines(remarks: Mapping[str, Any]) -> list[str]:
    """Remarks of a task as text, one line each."""

    def text(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {text(part)}" for name, part in value.items())
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return [f"{name.replace('_', ' ')}: {text(remark)}" for name, remark in remarks.items()]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as text in columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def percent(share: float) -> str:
    """A share in [0, 1], to a tenth of a percent."""
    return f"{100 * share:.1f} %"


def number(value: float) -> str:
    """A number to five digits."""
    return f"{value:.5g}"
