"""The flat dataset: contents, truncation, and one error for all unusable rows."""

import io
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_jepa.data._sequences import SequenceDataset, build_sequences
from dllm_jepa.errors import DataError

Rows = list[tuple[list[int], list[bool], str]]


def build(
    rows: Rows, *, max_seq_len: int = 8, too_long: str = "truncate", shift_logits: bool = False, progress: bool = False
) -> SequenceDataset:
    return build_sequences(
        rows,
        source="train.jsonl",
        max_seq_len=max_seq_len,
        too_long=too_long,  # type: ignore[arg-type]
        shift_logits=shift_logits,
        progress=progress,
    )


def row(name: str, length: int, *maskable: int) -> tuple[list[int], list[bool], str]:
    return list(range(10, 10 + length)), [position in maskable for position in range(length)], name


def message(rows: Rows, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        build(rows, **options)  # type: ignore[arg-type]
    return str(caught.value)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), min_size=2), min_size=1))
def test_holds_exactly_the_rows(content: list[list[tuple[int, bool]]]) -> None:
    rows = [([token for token, _ in line], [True, *(flag for _, flag in line[1:])], "row") for line in content]
    dataset = build(rows, max_seq_len=1000)
    assert len(dataset) == len(rows)
    assert dataset.lengths.tolist() == [len(line) for line in content]
    arrays = (dataset.tokens, dataset.maskable, dataset.offsets, dataset.lengths)
    assert [array.dtype.name for array in arrays] == ["int32", "bool", "int64", "int64"]
    for index, (tokens, maskable, _) in enumerate(rows):
        for at in (index, index - len(rows)):
            assert dataset[at][0].tolist() == tokens
            assert dataset[at][1].tolist() == maskable
    assert dataset.num_truncated == 0
    assert dataset.source == "train.jsonl"


def test_index_out_of_range() -> None:
    dataset = build([row("a", 3, 2)])
    for index in (1, -2):
        with pytest.raises(IndexError, match=f"sequence {index} of 1"):
            dataset[index]


def test_truncation_cuts_the_end_and_is_counted() -> None:
    dataset = build([row("a", 8, 7), row("b", 9, 3, 8), row("c", 20, 7)])
    assert dataset.lengths.tolist() == [8, 8, 8]
    assert dataset[1][0].tolist() == list(range(10, 18))
    assert dataset[1][1].tolist() == [position == 3 for position in range(8)]
    assert dataset[2][0].tolist() == list(range(10, 18))
    assert len(dataset.tokens) == len(dataset.maskable) == dataset.offsets[-1] == 24
    assert dataset.num_truncated == 2


def test_a_warning_says_how_much_is_cut_and_what_would_fit() -> None:
    lengths = [*range(2, 99), 250, 300]  # of 99: half have at most 51, 90 % at most 91, 99 % (99 of them) all
    rows = [row("a", length, 1) for length in lengths]
    assert build(rows[:97], max_seq_len=98).warnings == build(rows, max_seq_len=300).warnings == []
    (warning,) = build(rows, max_seq_len=90).warnings
    assert "10.1% of the sequences are cut to max_seq_len=90" in warning
    assert "50 % have at most 51 tokens, 90 % 91, 99 % 300, and the longest has 300: max_seq_len=300 fits" in warning
    # One in a hundred is a few outliers; of 200 rows, 99 % are 198.
    many = [row("a", length, 1) for length in [10] * 196 + [20, 30, 40, 50]]
    assert build(many, max_seq_len=30).warnings == []
    (warning,) = build(many, max_seq_len=20).warnings
    assert "99 % 30, and the longest has 50: max_seq_len=30 fits 99 %" in warning


def test_first_token_of_a_shifted_model_is_never_maskable() -> None:
    rows = [row("a", 3, 0, 1)]
    assert build(rows)[0][1].tolist() == [True, True, False]
    assert build(rows, shift_logits=True)[0][1].tolist() == [False, True, False]
    # What is left must still hold a maskable token.
    assert "line 1: no maskable token" in message([row("line 1", 3, 0)], shift_logits=True)


def test_unusable_row_is_named() -> None:
    no_response = "no maskable token: there is no response to train on"
    for unusable, options, expected in [
        (row("line 3", 4), {}, no_response),
        (row("line 3", 0), {}, no_response),
        (row("line 3", 1, 0), {}, "its only token has nothing beside it: a view needs a masked and a visible token"),
        (row("line 3", 9, 8), {}, "no maskable token is left of its 9 tokens at max_seq_len 8"),
        (
            row("line 3", 9, 2),
            {"too_long": "refuse"},
            "9 tokens, above max_seq_len 8 (raise it, or set too_long to truncate)",
        ),
    ]:
        text = message([row("line 1", 3, 2), unusable], **options)
        assert text == f"train.jsonl: 1 row cannot be used\n  line 3: {expected}"


def test_all_unusable_rows_are_counted_and_five_are_named() -> None:
    rows = [row("good", 3, 2), *(row(f"line {number}", 4) for number in range(2, 10)), row("line 10", 1, 0)]
    text = message(rows)
    assert text.startswith("train.jsonl: 9 rows cannot be used\n  line 2: no maskable token")
    assert text.count("\n") == 6
    assert "line 6: " in text and "line 7: " not in text
    assert text.endswith("\n  and 4 more")
    assert "more" not in message(rows[:6])


def test_no_rows() -> None:
    assert message([]) == "train.jsonl has no rows"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "shown"), [(Terminal, True, True), (Terminal, False, False), (io.StringIO, True, False)]
)
def test_progress_bar_only_on_a_terminal_and_on_request(
    monkeypatch: pytest.MonkeyPatch, stream: type[io.StringIO], progress: bool, shown: bool
) -> None:
    stderr = stream()
    monkeypatch.setattr(sys, "stderr", stderr)
    build([row("a", 3, 2)], progress=progress)
    assert ("tokenizing train.jsonl" in stderr.getvalue()) is shown
