"""Django scores: white space does not count, what follows the gold line does not count against the prefix match."""

import pytest

from dllm_jepa.errors import DataError
from dllm_jepa.evals import django

GOLD = "def strip_tags ( value ) :"


def measures(prediction: str, code: str = GOLD) -> tuple[object, object]:
    score = django.score(prediction, {"annotation": "define it", "code": code})
    assert list(score.measures) == ["prefix_match", "exact_match"]
    return score.measures["prefix_match"], score.measures["exact_match"]


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (GOLD, (True, True)),
        (f"\n  {GOLD}\t\n", (True, True)),
        ("def   strip_tags\n( value )\t:", (True, True)),
        (f"{GOLD} pass", (True, False)),
        (f"x {GOLD}", (False, False)),
        ("def strip_tags(value):", (False, False)),
        ("", (False, False)),
    ],
)
def test_prefix_and_exact_match(prediction: str, expected: tuple[bool, bool]) -> None:
    assert measures(prediction) == expected


def test_a_blank_gold_line_is_refused() -> None:
    # Any text starts with nothing: the row would be right for every prediction.
    with pytest.raises(DataError, match="'code' is blank"):
        measures("anything", "\n\t ")
