"""From token ids to text that can be shown piece by piece while the rest is still masked."""

import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Kind = Literal["text", "mask", "end"]

# The longest character of UTF-8, in bytes: so many tokens may have to be decoded together.
_MOST_TOKENS_OF_A_CHARACTER = 4
_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not UTF-8, such as half a character

# Categories of characters that are no text but instructions: control, format (bidirectional overrides), half a
# surrogate pair, line and paragraph separators.
_INSTRUCTIONS = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_HARMLESS = set("\n\t\u200c\u200d\u200e\u200f")  # scripts and emoji need joiners and direction marks


class PieceTokenizer(Protocol):
    """What showing tokens needs of a tokenizer."""

    mask_id: int

    @property
    def end_ids(self) -> Collection[int]:
        """Ids that end a response."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens that make up whole characters: nearly always one.

    Args:
        start: position of the first one on the canvas.
        end: position behind the last one.
        kind: `mask` and `end` are single tokens: still masked, or one that ends a response.
        text: their text; of a mask "".
    """

    start: int
    end: int
    kind: Kind
    text: str


def split_pieces(tokenizer: PieceTokenizer, canvas: Sequence[int]) -> list[Piece]:
    """Cut a canvas into pieces that can be shown, in their order; each position belongs to one of them.

    A token may hold only some bytes of a character; it is joined with its neighbours until the character is whole. A
    character of which a part is still masked shows as U+FFFD.
    """
    pieces: list[Piece] = []
    start = 0  # of the piece that is being made; what is before it is in a piece
    for position, token_id in enumerate(canvas):
        is_mask, is_end = token_id == tokenizer.mask_id, token_id in tokenizer.end_ids
        if (is_mask or is_end) and start < position:
            pieces.append(_text_piece(tokenizer, canvas, start, position))
            start = position
        if is_mask:
            pieces.append(Piece(position, position + 1, "mask", ""))
        elif is_end:
            name = tokenizer.decode([token_id], skip_special_tokens=False)
            pieces.append(Piece(position, position + 1, "end", name))
        else:
            piece = _text_piece(tokenizer, canvas, start, position + 1)
            if piece.text.endswith(_REPLACEMENT) and position + 1 - start < _MOST_TOKENS_OF_A_CHARACTER:
                continue
            pieces.append(piece)
        start = position + 1
    if start < len(canvas):
        pieces.append(_text_piece(tokenizer, canvas, start, len(canvas)))
    return pieces


def _text_piece(tokenizer: PieceTokenizer, canvas: Sequence[int], start: int, end: int) -> Piece:
    return Piece(start, end, "text", tokenizer.decode(canvas[start:end], skip_special_tokens=False))


def visible(text: str) -> str:
    r"""Write control and format characters as `\x1b` or `\u202e`, so that none of them acts on who shows the text.

    Line feeds, tabs, joiners and direction marks stay.
    """
    return "".join(
        character
        if character in _HARMLESS or unicodedata.category(character) not in _INSTRUCTIONS
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )
