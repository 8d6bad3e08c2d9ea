"""Frames of a terminal: as wide as it is, one over the other, and never more than text."""

import io
import random
import re
import unicodedata

import pytest

from dllm_jepa.generation.show import DenoisingView, encodable, frame_lines, is_terminal, split_pieces
from dllm_jepa.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MASK, END = TOKENIZER.mask_id, TOKENIZER.eos_id
TEXT = "lines with \u4e2d\u6587\u4e2d, nai\u0308ve \U0001f600\n\nor .*[0-9]{2,}\nx"
STYLE = re.compile(r"\x1b\[[0-9;]*m")
HOSTILE = "a\x1b[2J\x1b]0;title\x07\x9b5A\rb\x08\x0b\u202ec\x00\x7f"


class Screen:
    """A terminal of which only what the view uses works: the reference that the frames are drawn on."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.rows: list[list[str]] = [[]]
        self.row = self.column = 0
        self.wraps = True

    def feed(self, text: str) -> None:
        for escape, number, letter, character in re.findall(r"(\x1b\[([?0-9;]*)([A-Za-z]))|([^\x1b])", text):
            if escape:
                self.control(number, letter)
            elif character == "\n":
                self.row, self.column = self.row + 1, 0
                if self.row == len(self.rows):
                    self.rows.append([])
            elif character == "\r":
                self.column = 0
            else:
                self.put(character)

    def control(self, number: str, letter: str) -> None:
        if letter == "A":  # not above the first line that is on the screen
            self.row = max(self.row - int(number), len(self.rows) - self.height, 0)
        elif letter == "K":
            del self.rows[self.row][self.column :]
        elif letter == "J":
            del self.rows[self.row][self.column :], self.rows[self.row + 1 :]
        elif letter in "hl":
            assert number == "?7"
            self.wraps = letter == "h"
        else:
            assert letter == "m"

    def put(self, character: str) -> None:
        if unicodedata.combining(character):
            self.rows[self.row][self.column - 1] += character
            return
        cells = [character, ""] if unicodedata.east_asian_width(character) == "W" else [character]
        if self.column + len(cells) > self.width:
            assert self.wraps, "a line is wider than the terminal"
            self.feed("\n")
        self.rows[self.row][self.column : self.column + len(cells)] = cells
        self.column += len(cells)

    def text(self) -> list[str]:
        return ["".join(row) for row in self.rows]


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def plain(lines: list[str]) -> list[str]:
    return [STYLE.sub("", line) for line in lines]


@pytest.fixture(autouse=True)
def small_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("LINES", "6")
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.parametrize("width", [2, 7, 80])
def test_lines_break_where_a_terminal_would_break_them(width: int) -> None:
    screen = Screen(width, 100)
    screen.feed(TEXT)
    assert len(screen.text()) >= 4
    assert (
        plain(frame_lines(split_pieces(TOKENIZER, TOKENIZER.encode(TEXT)), (), width=width, height=100))
        == screen.text()
    )


def test_masks_new_tokens_and_the_end_are_told_apart() -> None:
    a, b, c = (TOKENIZER.encode(letter)[0] for letter in "abc")
    lines = frame_lines(split_pieces(TOKENIZER, [a, MASK, MASK, b, END, c]), {3}, width=10, height=5)
    assert lines == ["a\x1b[2m\u2591\u2591\x1b[0m\x1b[7mb\x1b[0m\x1b[2m\u00b7c\x1b[0m"]
    wrapped = frame_lines(split_pieces(TOKENIZER, [MASK] * 5), (), width=2, height=5)
    assert wrapped == ["\x1b[2m\u2591\u2591\x1b[0m", "\x1b[2m\u2591\u2591\x1b[0m", "\x1b[2m\u2591\x1b[0m"]


def test_of_too_many_lines_the_last_with_text_is_shown() -> None:
    ids = TOKENIZER.encode("0\n1\n2\n3\n4")
    assert plain(frame_lines(split_pieces(TOKENIZER, ids), (), width=9, height=3)) == ["2", "3", "4"]
    assert plain(frame_lines(split_pieces(TOKENIZER, ids), (), width=9, height=5)) == ["0", "1", "2", "3", "4"]
    tail = [*ids, *[MASK] * 40]
    assert plain(frame_lines(split_pieces(TOKENIZER, tail), (), width=9, height=3))[-1].startswith("4\u2591")
    only_masks = frame_lines(split_pieces(TOKENIZER, [MASK] * 40), (), width=9, height=3)
    assert len(only_masks) == 3
    ended = [*ids[:1], END, *ids[1:]]  # what is behind the end is not what one wants to see
    assert plain(frame_lines(split_pieces(TOKENIZER, ended), (), width=9, height=3))[0] == "0\u00b7"


@pytest.mark.parametrize("lines_before", [0, 4, 30])
def test_a_frame_takes_the_place_of_the_one_before(lines_before: int) -> None:
    stream, screen = Terminal(), Screen(20, 6)
    before = [f"before {number}" for number in range(lines_before)]
    screen.feed("".join(f"{line}\n" for line in before))
    ids = TOKENIZER.encode("x" * 30 + TEXT + "\n" + "y" * 50)
    canvas = [MASK] * len(ids)
    view = DenoisingView(stream, TOKENIZER)
    rng, order, at = random.Random(0), list(range(len(ids))), 0
    rng.shuffle(order)
    for count in (1, 20, 5, len(ids)):
        for position in order[:count]:
            canvas[position] = ids[position]
        del order[:count]
        view.draw(canvas, ())
        screen.feed(stream.getvalue()[at:])
        at = len(stream.getvalue())
        frame = plain(frame_lines(split_pieces(TOKENIZER, canvas), (), width=20, height=5))
        assert screen.text() == [*before, *frame, ""]
        assert screen.wraps
    view.clear()
    screen.feed(stream.getvalue()[at:])
    assert screen.text() == [*before, ""]


def test_a_hostile_response_cannot_command_the_terminal() -> None:
    ids = TOKENIZER.encode(HOSTILE)
    assert TOKENIZER.decode(ids) == HOSTILE
    stream = Terminal()
    DenoisingView(stream, TOKENIZER).draw(ids, {0})
    ours = re.compile(r"\r?(\x1b\[(\d+A|\?7[lh]|[KJ027]?m?))")
    left = ours.sub("", stream.getvalue()).replace("\n", "")
    assert [character for character in left if unicodedata.category(character) in ("Cc", "Cf")] == []
    assert left == r"a\x1b[2J\x1b]0;title\x07\x9b5A\rb\x08\x0b\u202ec\x00\x7f"


def test_signs_that_an_encoding_lacks_are_replaced() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    DenoisingView(stream, TOKENIZER).draw([MASK, *TOKENIZER.encode("\u4e2d"), END], ())
    assert STYLE.sub("", raw.getvalue().decode("ascii")).split("\x1b")[1] == "[?7l_\\u4e2d."
    assert encodable("\u4e2d\n", stream) == "\\u4e2d\n"
    assert encodable("\u4e2d", io.TextIOWrapper(io.BytesIO(), encoding="utf-8")) == "\u4e2d"


def test_what_counts_as_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_terminal(Terminal()) and not is_terminal(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal(Terminal())
