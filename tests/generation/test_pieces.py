"""Pieces of a canvas: whole characters, nothing lost, nothing that acts on who shows them."""

import random
import unicodedata

from dllm_jepa.generation.show import split_pieces, visible
from dllm_jepa.models.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MASK, END = TOKENIZER.mask_id, TOKENIZER.eos_id
TEXT = "lines with \u4e2d\u6587, na\u00efve \U0001f600\n\tor .*[0-9]{2,}"


def texts(canvas: list[int]) -> list[str]:
    return [piece.text for piece in split_pieces(TOKENIZER, canvas)]


def test_pieces_of_a_text_are_whole_characters_that_join_to_it() -> None:
    ids = TOKENIZER.encode(TEXT)
    assert len(ids) > len(TOKENIZER.encode(TEXT.encode("ascii", "ignore").decode())) + 9  # several tokens a character
    pieces = split_pieces(TOKENIZER, ids)
    assert "".join(piece.text for piece in pieces) == TEXT
    assert {"\u4e2d", "\u6587", "\u00ef", "\U0001f600"} <= {piece.text for piece in pieces}


def test_every_position_is_in_one_piece_whatever_is_masked() -> None:
    rng, kinds = random.Random(0), {MASK: "mask", END: "end"}
    for _ in range(5):
        ids = [rng.choice([token_id, token_id, MASK, END]) for token_id in TOKENIZER.encode(TEXT)]
        pieces = split_pieces(TOKENIZER, ids)
        assert [at for piece in pieces for at in range(piece.start, piece.end)] == list(range(len(ids)))
        for piece in pieces:
            assert {kinds.get(token_id, "text") for token_id in ids[piece.start : piece.end]} == {piece.kind}
            if piece.kind == "text":
                assert piece.text == TOKENIZER.decode(ids[piece.start : piece.end])


def test_half_a_character_shows_as_a_replacement_until_the_rest_is_there() -> None:
    first, *rest = TOKENIZER.encode("\U0001f600")
    assert len(rest) == 3
    assert texts([first, MASK, MASK, MASK]) == ["\ufffd", "", "", ""]
    assert texts([first, rest[0], MASK, *TOKENIZER.encode("a")]) == ["\ufffd", "", "a"]
    assert texts([first, *rest]) == ["\U0001f600"]


def test_bytes_that_are_no_text_do_not_swallow_what_follows() -> None:
    lead, _ = TOKENIZER.encode("\u00ef")
    assert len(split_pieces(TOKENIZER, [lead] * 9)) == 3  # a character has four bytes at most


def test_special_tokens_show_by_name_and_those_that_end_a_response_as_such() -> None:
    ends = sorted(TOKENIZER.end_ids)
    assert [(piece.kind, piece.text) for piece in split_pieces(TOKENIZER, ends)] == [
        ("end", TOKENIZER.decode([token_id], skip_special_tokens=False)) for token_id in ends
    ]
    assert all(text.startswith("<|") for text in texts([*ends, TOKENIZER.bos_id]))


def test_visible_text_has_no_character_that_acts() -> None:
    assert visible("a\x1b[31mb\r\x07\x9b\u202ec\u2028") == r"a\x1b[31mb\r\x07\x9b\u202ec\u2028"
    acting = [
        chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    ]
    assert set(acting) & set(visible("".join(acting))) == set("\n\t\u200c\u200d\u200e\u200f")
    assert visible(TEXT) == TEXT
