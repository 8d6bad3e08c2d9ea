"""Scores of lines of Python, by their text."""

from collections.abc import Mapping
from typing import Any

from dllm_jepa.errors import DataError
from dllm_jepa.evals._task import Score


def gold_code(row: Mapping[str, Any]) -> str:
    """The gold line, `code` of a row, with its white space collapsed.

    Raises:
        DataError: it is blank. Every text starts with nothing, so that any prediction would be right.
    """
    gold = _collapse(row["code"])
    if not gold:
        raise DataError("field 'code' is blank, and every prediction would match it; remove the row")
    return gold


def score(prediction: str, row: Mapping[str, Any]) -> Score:
    """Compare a generated line with `code` of a row, runs of white space counting as one blank and none at the ends.

    Returns:
        `prefix_match`, whether the prediction starts with the gold line, and `exact_match`, whether it is that line.

    Raises:
        DataError: the gold line is blank.
    """
    gold, generated = gold_code(row), _collapse(prediction)
    return Score({"prefix_match": generated.startswith(gold), "exact_match": generated == gold})


def _collapse(text: str) -> str:
    return " ".join(text.split())
