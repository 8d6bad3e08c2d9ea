"""GSM8K scores: what counts as a number, which one counts, and predictions that nobody would expect."""

import re
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_jepa.errors import DataError
from dllm_jepa.evals import gsm8k


def row(number: str) -> dict[str, str]:
    return {"question": "How many?", "answer": f"First 7 + 4 = <<7+4=11>>11.\n#### {number}"}


def measures(prediction: str, gold: str = "18") -> tuple[object, object]:
    score = gsm8k.score(prediction, row(gold))
    assert list(score.measures) == ["strict", "flexible"]
    return score.measures["strict"], score.measures["flexible"]


@pytest.mark.parametrize("gold", ["18", "-3", "1,234,567", "0", "2.50", "$5", "18."])
def test_every_gold_answer_matches_itself(gold: str) -> None:
    assert measures(row(gold)["answer"], gold) == (True, True)


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("#### 18.", "18"),
        ("####18", "18"),
        ("#####  \t18 apples", "18"),
        ("#### $ 1,800.50", "1800.5"),
        ("#### - 18", "-18"),
        ("#### $-18", "-18"),
        ("#### -0", "0"),
        ("#### .5", "0.50"),
        ("#### 1000,000", "1,000,000"),
        ("#### 18 #### 19", "18"),
        ("#### 8{,}000", "8000"),
        (r"#### \$8{,}000", "8000"),
        ("#### \u221218", "-18"),
    ],
)
def test_strict_takes_the_first_number_behind_hashes(prediction: str, gold: str) -> None:
    assert measures(prediction, gold)[0] is True


@pytest.mark.parametrize(
    "prediction",
    ["18", "### 18", "####\n18", "#### 19\n#### 18", "#### 180", "#### 18.5", "#### -18", "#### 18{,}000"],
)
def test_strict_refuses_what_is_close(prediction: str) -> None:
    assert measures(prediction)[0] is False


@pytest.mark.parametrize(
    ("prediction", "gold"),
    [
        ("#### 19 no, 18", "18"),
        ("3 apples, so $1,800.00!", "1800"),
        ("16-3=13", "13"),
        ("it is 20-18", "18"),
        ("it is 20 -18", "-18"),
        ("(20)-18", "18"),
        ("it lost $-18", "-18"),
        ("is .5", "0.5"),
        (r"\boxed{$9{,}500}", "9500"),
        (r"3 \times 4\,000 = 12\,000", "12000"),
        (r"$9,\!500", "9500"),
        ("$1{,}234{,}567.50$", "1234567.5"),
        (r"it lost -\$18", "-18"),
        ("it lost \\$\u221218", "-18"),
        ("x = \u221218", "-18"),
        ("of 1{,}2", "2"),
        (r"18\,m", "18"),
    ],
)
def test_flexible_takes_the_last_number(prediction: str, gold: str) -> None:
    assert measures(prediction, gold)[1] is True


@pytest.mark.parametrize("prediction", ["18 of 20", "", "18 (see 2)", "1 8", "18.5", "9{,}018", r"1\,018", "\u221218"])
def test_flexible_refuses_what_is_close(prediction: str) -> None:
    assert measures(prediction)[1] is False


def test_note_says_what_is_missing() -> None:
    assert gsm8k.score("", row("1")).note == "no number"
    assert gsm8k.score("It is 1", row("1")).note == "no `#### number`"
    assert gsm8k.score("#### 2", row("1")).note == ""


def test_a_gold_answer_without_number_is_refused() -> None:
    with pytest.raises(DataError, match="'answer' has no `#### number`"):
        gsm8k.score("#### 18", {"answer": "It is 18. #### eighteen"})


def test_numbers_of_any_length_are_exact() -> None:
    digits = "7" * 10_000
    assert measures(f"#### {digits}", digits) == (True, True)
    assert measures(f"#### {digits[:-1]}8", digits) == (False, False)
    assert measures(f"#### {digits}.{'0' * 10_000}1", digits) == (False, False)


LONG = 200_000


@pytest.mark.parametrize("piece", ["#", "9", "####9", "1,", "-", "\ud800", "1,000", "####-$ ", "1{,}", "1\\,"])
def test_a_long_text_of_anything_takes_linear_time(piece: str) -> None:
    # A pass takes some 10 ms; with backtracking over the length squared the test would take minutes.
    assert measures(piece * (LONG // len(piece)), "18") == (False, False)


@given(st.text(alphabet="#0123456789,.$-+ \n(ax", max_size=60))
def test_strict_agrees_with_a_plain_reading(text: str) -> None:
    expected = None
    for at in range(len(text)):
        behind = text[at + 4 :].lstrip(" \t$")
        sign = behind[:1] if behind[:1] in ("+", "-") else ""
        number = re.match(r"(\d+(?:,\d{3}(?!\d))*(?:\.\d+)?|\.\d+)", behind[len(sign) :].lstrip(" \t$"))
        if text[at : at + 4] == "####" and number:
            expected = Decimal(sign + number[0].replace(",", ""))
            break
    for gold in ("0", "1", "-1", str(expected or 0)):
        assert measures(text, gold)[0] is (expected == Decimal(gold))
