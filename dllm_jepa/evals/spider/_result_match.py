"""Whether two results of queries are the same, whatever the order of their columns."""

from collections import Counter
from collections.abc import Iterator, Sequence

from dllm_jepa.evals.spider._sandbox import Value

# Cells that the search for a column order may look at: seconds. No two results seen so far come near.
_MAX_CELLS = 10_000_000

_Column = tuple[int, ...]


def same_result(gold: Sequence[tuple[Value, ...]], predicted: Sequence[tuple[Value, ...]], *, ordered: bool) -> bool:
    """Whether some order of the columns of `predicted` makes it `gold`.

    Values are equal as in Python: 1 and 1.0 are, 1 and "1" are not, None is itself. Two results without rows are the
    same, whatever their columns. False also where the search would take too long, for results that look alike in every
    way it knows.

    Args:
        gold: rows, all of one length.
        predicted: rows, all of one length.
        ordered: the order of the rows counts; otherwise only how often each occurs.

    Source: taoyds/test-suite-sql-eval, exec_eval.py, the rules of `result_eq`.
    """
    if len(gold) != len(predicted):
        return False
    if not gold:
        return True
    numbers: dict[Value, int] = {}
    gold_rows, predicted_rows = _number(gold, numbers), _number(predicted, numbers)
    if ordered:
        return Counter(zip(*gold_rows, strict=True)) == Counter(zip(*predicted_rows, strict=True))
    # The cheapest test fails for most of what is wrong: the same rows, each with its values in any order.
    if Counter(tuple(sorted(row)) for row in gold_rows) != Counter(tuple(sorted(row)) for row in predicted_rows):
        return False
    return _Search(list(zip(*gold_rows, strict=True)), list(zip(*predicted_rows, strict=True))).succeeds()


def _number(rows: Sequence[tuple[Value, ...]], numbers: dict[Value, int]) -> list[tuple[int, ...]]:
    """Rows with a number for every value, equal where the values are."""
    return [tuple(numbers.setdefault(value, len(numbers)) for value in row) for row in rows]


class _Search:
    """Looks for a partner for one gold column after the other.

    The columns chosen so far must, row by row, occur equally often on both sides; so columns that look alike one by
    one are told apart as soon as a second one is chosen, and of predicted columns with the same values one is tried.
    """

    def __init__(self, gold: list[_Column], predicted: list[_Column]) -> None:
        # The columns with most values first: they tell most about the rows.
        self._gold = sorted(gold, key=lambda column: -len(set(column)))
        self._predicted = predicted
        self._cells = 0

    def succeeds(self) -> bool:
        # Depth first; one iterator of partners for each gold column that has been reached.
        start = [0] * len(self._gold[0])
        levels = [self._partners(start, start, frozenset())]
        while levels and self._cells <= _MAX_CELLS:
            step = next(levels[-1], None)
            if step is None:
                levels.pop()
                continue
            gold_groups, predicted_groups, used = step
            if len(used) == len(self._gold):
                return True
            levels.append(self._partners(gold_groups, predicted_groups, used))
        return False

    def _partners(
        self, gold_groups: list[int], predicted_groups: list[int], used: frozenset[int]
    ) -> Iterator[tuple[list[int], list[int], frozenset[int]]]:
        """Partners of the next gold column, with the groups of rows that are alike in all columns chosen then."""
        groups: dict[tuple[int, int], int] = {}
        gold_groups = _regroup(gold_groups, self._gold[len(used)], groups)
        wanted = Counter(gold_groups)
        tried: set[_Column] = set()
        for number, column in enumerate(self._predicted):
            if number in used or column in tried:
                continue
            tried.add(column)
            self._cells += len(column)
            regrouped = _regroup(predicted_groups, column, groups)
            if Counter(regrouped) == wanted:
                yield gold_groups, regrouped, used | {number}


def _regroup(groups: list[int], column: _Column, numbers: dict[tuple[int, int], int]) -> list[int]:
    return [numbers.setdefault(pair, len(numbers)) for pair in zip(groups, column, strict=True)]
