"""The built-in tokenizer: whole words and regex pieces. What it shares with others is tested in test_tokenizer.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_jepa.data._regex_pairs import WORDINGS, WORDS, generate_regex_pairs
from dllm_jepa.models.tiny._tokenizer import tiny_tokenizer
from dllm_jepa.models.tiny._vocabulary import PIECES, SPECIAL_TOKENS

TOKENIZER = tiny_tokenizer()
CHAT = [
    {"role": "system", "content": "Go."},
    {"role": "user", "content": "a dog"},
    {"role": "assistant", "content": ".*dog.*"},
]


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, *PIECES, "<0xE2>", "\u0120", "\u2603", " ", "x"])).map("".join))
def test_names_of_tokens_inside_text_stay_text(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert not {TOKENIZER.mask_id, TOKENIZER.eos_id, TOKENIZER.bos_id} & set(ids)
    assert TOKENIZER.decode(ids) == text


def test_printable_ascii_is_one_token_per_character_at_most() -> None:
    for code in range(0x20, 0x7F):
        assert len(TOKENIZER.encode(chr(code))) == 1
    for piece in PIECES:
        assert len(TOKENIZER.encode(piece)) == 1, piece


@pytest.mark.parametrize("task", ["first", "second"])
def test_words_and_regex_pieces_of_the_generator_are_single_tokens(task: str) -> None:
    wording = WORDINGS[task]
    pieces = {*WORDS, *(unit.regex for unit in wording.classes), *"()|&~+", ".*"}
    pieces |= {f"{{{times}}}" for times in range(2, 8)} | {f"{{{times},}}" for times in range(2, 8)}
    if "whole_word" in wording.clauses:
        pieces.add(r"\b")
    for piece in pieces:
        assert len(TOKENIZER.encode(piece)) == 1, piece
    pairs = generate_regex_pairs(num_pairs=500, seed=0, split="train", task=task)  # type: ignore[arg-type]
    for pair in pairs:
        description = pair["description"]
        assert len(TOKENIZER.encode(description)) == len(description.split(" ")), description
        # Nothing but the pieces above: none is broken up, none is glued to its neighbour.
        tokens = [TOKENIZER.decode([token_id]) for token_id in TOKENIZER.encode(pair["regex"])]
        assert set(tokens) <= pieces, pair["regex"]


def test_special_tokens() -> None:
    special = [TOKENIZER.mask_id, TOKENIZER.eos_id, TOKENIZER.bos_id]
    assert len(set(special)) == 3
    assert TOKENIZER.pad_id == TOKENIZER.eos_id
    assert TOKENIZER.token_ids == list(range(TOKENIZER.vocab_size))
    assert TOKENIZER.vocab_size < 512
    assert TOKENIZER.decode([TOKENIZER.bos_id, *TOKENIZER.encode("a dog"), TOKENIZER.eos_id]) == "a dog"  # type: ignore[list-item]


def test_chat_format() -> None:
    ids, response = TOKENIZER.encode_chat(CHAT)
    written = [TOKENIZER.decode([token_id], skip_special_tokens=False) for token_id in ids]
    assert written == [
        *("<|startoftext|>", "<|system|>", "G", "o", ".", "<|end|>"),
        *("<|user|>", "a", " dog", "<|end|>", "<|assistant|>", ".*", "dog", ".*", "<|end|>"),
    ]
    assert response == [False] * 11 + [True] * 4
