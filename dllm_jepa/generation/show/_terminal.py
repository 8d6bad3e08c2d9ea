"""The denoising of one canvas in a terminal: every frame is drawn over the one before it."""

import os
import shutil
import time
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from typing import TextIO

from dllm_jepa.generation.show._pieces import Piece, PieceTokenizer, split_pieces, visible

_RESET, _FAINT, _REVERSED = "\x1b[0m", "\x1b[2m", "\x1b[7m"
_CLEAR_TO_END_OF_LINE, _CLEAR_BELOW = "\x1b[K", "\x1b[J"
# Without wrapping a line that the terminal takes for wider than we do is cut, and does not move those below it.
_WRAP_OFF, _WRAP_ON = "\x1b[?7l", "\x1b[?7h"

_MASK_SIGN, _END_SIGN = "\u2591", "\u00b7"  # light shade, middle dot
_PLAIN_SIGNS = str.maketrans({_MASK_SIGN: "_", _END_SIGN: "."})
_TAB = "    "

_SECONDS_PER_FRAME = 0.04  # a small model would be done before anybody has seen a step


class DenoisingView:
    """Draws the canvas after every step, in place. Between two frames the terminal is as it was found."""

    def __init__(self, stream: TextIO, tokenizer: PieceTokenizer) -> None:
        self._stream = stream
        self._tokenizer = tokenizer
        self._num_lines = 0
        self._next_frame = 0.0

    def draw(self, canvas: Sequence[int], new: Collection[int]) -> None:
        """Draw a canvas over the last one, at most 25 times a second; `new` are positions filled in the last step."""
        time.sleep(max(0.0, self._next_frame - time.monotonic()))
        self._next_frame = time.monotonic() + _SECONDS_PER_FRAME
        size = shutil.get_terminal_size()
        width, height = max(size.columns, 2), max(size.lines - 1, 1)
        self._write(frame_lines(split_pieces(self._tokenizer, canvas), new, width=width, height=height))

    def clear(self) -> None:
        """Remove the last frame; what is written next stands in its place."""
        self._write([])

    def _write(self, lines: Sequence[str]) -> None:
        body = "".join(f"{line}{_CLEAR_TO_END_OF_LINE}\n" for line in lines)
        up = f"\x1b[{self._num_lines}A" if self._num_lines else ""
        frame = f"\r{up}{_WRAP_OFF}{body}{_CLEAR_BELOW}{_WRAP_ON}"
        if encodable(_MASK_SIGN + _END_SIGN, self._stream) != _MASK_SIGN + _END_SIGN:
            frame = frame.translate(_PLAIN_SIGNS)
        self._stream.write(encodable(frame, self._stream))
        self._stream.flush()
        self._num_lines = len(lines)


def frame_lines(pieces: Sequence[Piece], new: Collection[int], *, width: int, height: int) -> list[str]:
    """The lines of one frame, each as wide as the terminal at most.

    Masks are faint blocks, tokens that end a response faint dots, and what stands behind the first of these is faint
    too; the positions `new` are shown reversed. If there are more lines than fit, they end with the last one that has
    text.

    Returns:
        1 to `height` lines, with escape sequences for the styles and no others; every line ends in the plain style.
    """
    lines, styles, column, last_text = [""], [""], 0, 0
    for character, style, is_text in _characters(pieces, new):
        size = character_width(character)
        if character == "\n" or column + size > width:
            lines[-1] += _RESET if styles[-1] else ""
            lines.append("")
            styles.append("")
            column = 0
        if character == "\n":
            continue
        if style != styles[-1]:
            lines[-1] += (_RESET if styles[-1] else "") + style
            styles[-1] = style
        lines[-1] += character
        column += size
        last_text = len(lines) - 1 if is_text else last_text
    lines[-1] += _RESET if styles[-1] else ""
    end = max(height, last_text + 1)
    return lines[max(0, min(end, len(lines)) - height) : end]


def _characters(pieces: Sequence[Piece], new: Collection[int]) -> Iterator[tuple[str, str, bool]]:
    """Every character with its style, and whether it belongs to the response as far as that is known."""
    has_ended = False
    for piece in pieces:
        has_ended = has_ended or piece.kind == "end"
        is_new = any(position in new for position in range(piece.start, piece.end))
        style = _REVERSED if is_new else _FAINT if has_ended or piece.kind == "mask" else ""
        text = {"mask": _MASK_SIGN, "end": _END_SIGN}.get(piece.kind) or visible(piece.text).replace("\t", _TAB)
        for character in text:
            yield character, style, piece.kind == "text" and not has_ended


def character_width(character: str) -> int:
    """Columns that a terminal gives to a character; where terminals differ, the larger number."""
    if character in "\u200c\u200d\u200e\u200f" or unicodedata.category(character) == "Me":
        return 0
    if unicodedata.category(character) == "Mn":
        return int(character == "\ufe0f")  # asks for the picture of a sign, which is a column wider
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def is_terminal(stream: TextIO) -> bool:
    """Whether what is written can be drawn over."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def encodable(text: str, stream: TextIO) -> str:
    """The text, with an escape for every character that the stream's encoding does not have."""
    encoding = stream.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
