"""Scores of grade-school maths: is the number that a solution ends in the right one?"""

import re
from collections import deque
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from dllm_jepa.errors import DataError
from dllm_jepa.evals._task import Score

# A trailing dot is no part of a number, nor is a comma that no group of three digits follows. LaTeX writes the comma as
# {,} or \, or ,\! so that it is spaced as in a number. All repeats are possessive: what they took they never give
# back, so that the time is linear in the text.
_THOUSANDS = r"(?:\{,\}|\\,|,\\!|,)"
_NUMBER = rf"(?P<number>[0-9]++(?:{_THOUSANDS}[0-9]{{3}}(?![0-9]))*+(?:\.[0-9]++)?+|\.[0-9]++)"
_DOLLAR = r"\\?\$"
_SIGN = "[+\N{MINUS SIGN}-]"
_STRICT = re.compile(rf"####(?:[ \t]|{_DOLLAR})*+(?P<sign>{_SIGN}?)(?:[ \t]|{_DOLLAR})*+{_NUMBER}")
# Behind a digit, a letter or a bracket a sign means addition or subtraction.
_FLEXIBLE = re.compile(rf"(?:(?<![\w)\]])(?P<sign>{_SIGN})(?:{_DOLLAR})?+|{_DOLLAR}(?P<inner_sign>{_SIGN}))?+{_NUMBER}")


def gold_number(row: Mapping[str, Any]) -> Decimal:
    """The number behind the `####` of a gold solution, `answer` of a row.

    Raises:
        DataError: there is none.
    """
    number = _strict_number(row["answer"])
    if number is None:
        raise DataError(f"field 'answer' has no `#### number`; it ends in {row['answer'][-40:]!r}")
    return number


def score(prediction: str, row: Mapping[str, Any]) -> Score:
    """Compare the answer of a generated solution with that of the gold one, `answer` of a row, as numbers.

    Returns:
        `strict`, on the first number that stands behind a `####` (blanks, a sign and `$` may stand between), and
        `flexible`, on the last number of the text.

    Raises:
        DataError: the gold solution has no number.
    """
    gold = gold_number(row)
    strict, flexible = _strict_number(prediction), _last_number(prediction)
    note = "no number" if flexible is None else "no `#### number`" if strict is None else ""
    return Score({"strict": strict == gold, "flexible": flexible == gold}, note)


def _strict_number(text: str) -> Decimal | None:
    found = _STRICT.search(text)
    return found and _value(found["sign"], found["number"])


def _last_number(text: str) -> Decimal | None:
    last = deque(_FLEXIBLE.finditer(text), maxlen=1)
    return _value(last[0]["sign"] or last[0]["inner_sign"] or "", last[0]["number"]) if last else None


def _value(sign: str, digits: str) -> Decimal:
    # Exact at any length, and unlike int not limited to some thousand digits.
    return Decimal(sign.replace("\N{MINUS SIGN}", "-") + re.sub(r"[^0-9.]", "", digits))
