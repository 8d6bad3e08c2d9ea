"""Scores from the lines of generations.jsonl, and the table that shows them."""

from typing import Any

import pytest

from dllm_jepa.errors import DataError
from dllm_jepa.evals import ItemResult, Score
from dllm_jepa.evals._statistics import bootstrap_interval, wilson_interval
from dllm_jepa.evals._summary import remark_lines, summarize, table


def rows(**measures: list[Any]) -> list[dict[str, Any]]:
    results = zip(*measures.values(), strict=True)
    scores = [Score(dict(zip(measures, values, strict=True))) for values in results]
    return [ItemResult(item, f"line {item + 1}", score, 1).to_json() for item, score in enumerate(scores)]


def test_shares_and_means_count_only_where_they_apply() -> None:
    summary = summarize(rows(strict=[True, False, None, True], loss=[1.0, 2, None, 6.0], never=[None] * 4))
    assert summary == {
        "strict": {"score": 2 / 3, "n": 3, "correct": 2, "interval": list(wilson_interval(2, 3))},
        "loss": {"mean": 3.0, "n": 3, "interval": list(bootstrap_interval([1.0, 2.0, 6.0]))},
        "never": {"n": 0},
    }
    assert list(summary) == ["strict", "loss", "never"]


def test_missing_is_not_false_nor_zero() -> None:
    summary = summarize([*rows(strict=[False], loss=[0.0]), *rows(strict=[False], loss=[0.0], extra=[True])])
    assert summary["strict"]["score"] == 0.0 and (summary["strict"]["n"], summary["extra"]["n"]) == (2, 1)
    assert summary["loss"] == {"mean": 0.0, "n": 2, "interval": [0.0, 0.0]}


def test_measures_that_cannot_be_counted_are_refused() -> None:
    for value in (float("nan"), float("inf"), "yes", [1], 10**400):
        with pytest.raises(DataError, match=r"measure 'loss' of item 1 \(line 2\) is .* finite number"):
            summarize(rows(loss=[1.0, value]))
    with pytest.raises(DataError, match="'strict' is true or false for some items and a number for others"):
        summarize(rows(strict=[True, 0.5]))


def test_table_is_aligned() -> None:
    summary = summarize(rows(strict=[True] * 940 + [False] * 379, loss=[2.0] * 1319, never=[None] * 1319))
    assert table(summary).splitlines() == [
        "measure   score     95 % interval  items",
        "strict   71.3 %  68.8 % to 73.6 %  1,319",
        "loss          2            2 to 2  1,319",
        "never         -                 -      0",
    ]


def test_remarks_are_lines() -> None:
    remarks = {"best_constant": {"regex": ".*x", "share": 0.156}, "golds": 1.0, "databases": "as given"}
    assert remark_lines(remarks) == ["best constant: regex .*x, share 0.156", "golds: 1", "databases: as given"]
    assert remark_lines({}) == []
