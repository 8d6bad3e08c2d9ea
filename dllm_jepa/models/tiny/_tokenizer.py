"""The built-in tokenizer of the demo: its pieces are words and regex pieces, and it needs no download."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dllm_jepa.models._tokenizer import Tokenizer, check_messages
from dllm_jepa.models.tiny._vocabulary import (
    BOS_TOKEN,
    END_OF_TURN_TOKEN,
    EOS_TOKEN,
    MASK_TOKEN,
    PIECES,
    ROLE_TOKENS,
    SPECIAL_TOKENS,
)

# Bytes that occur in no UTF-8 text: without a token they cannot be generated either.
_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


class TinyTokenizer(Tokenizer):
    """A small lossless tokenizer with a chat format of one token per mark.

    A conversation is `<|startoftext|>` and then per message `<|role|>`, content, `<|end|>`.
    """

    builder: ClassVar[str | None] = "dllm_jepa.models.tiny.tiny_tokenizer"
    published_names: ClassVar[Mapping[str, str]] = {
        "mask_token": MASK_TOKEN,
        "eos_token": EOS_TOKEN,
        "bos_token": BOS_TOKEN,
    }
    chat_tokens: ClassVar[tuple[str, ...]] = (*ROLE_TOKENS.values(), END_OF_TURN_TOKEN)

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Encode a conversation; see `Tokenizer.encode_chat`."""
        check_messages(messages)
        *role_ids, end_of_turn = self._chat_ids()
        ids = dict(zip(ROLE_TOKENS, role_ids, strict=True))
        return self._encode_turns(
            messages,
            before=[] if self.bos_id is None else [self.bos_id],
            header=lambda role: [ids[role]],
            end_of_turn=[end_of_turn],
            add_generation_prompt=add_generation_prompt,
        )


def tiny_tokenizer(path: str | Path | None = None) -> TinyTokenizer:
    """Build the built-in tokenizer, or read a saved one.

    Args:
        path: directory with tokenizer.json as `Tokenizer.save` writes it; None builds the tokenizer from its own
            vocabulary.

    Raises:
        CheckpointError: if the files are missing or broken.
    """
    if path is not None:
        return TinyTokenizer.read(path)
    return TinyTokenizer(_build(), **TinyTokenizer.published_names)


def _build() -> tokenizers.Tokenizer:
    """A unigram model over bytes in which every piece costs the same, so that the fewest pieces win."""
    # The library writes every byte as one visible character; its encoder knows which.
    visible = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    characters = _byte_characters()
    pieces = [characters[byte] for byte in range(256) if byte not in _NEVER_IN_UTF8]
    pieces += [visible.pre_tokenize_str(piece)[0][0] for piece in PIECES]
    tokenizer = tokenizers.Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces]))
    tokenizer.pre_tokenizer = visible
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _byte_characters() -> dict[int, str]:
    """The visible character by which the library writes each byte: itself, or the next free one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + n) for n, byte in enumerate(others)}
