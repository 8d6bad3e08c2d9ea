"""The tokenizer of Dream: Qwen2's byte-level vocabulary and ChatML."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from dllm_jepa.models._tokenizer import Tokenizer, check_messages
from dllm_jepa.models.files._tokenizer_files import judged_by_tokenizers

_DEFAULT_SYSTEM = "You are a helpful assistant."
# Where a text is cut before merging: contractions, words with the character before them, single digits, signs, line
# ends, spaces. Source: tokenization_dream.py of Dream-org/Dream-v0-Instruct-7B, the same as Qwen2's.
_CUTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class DreamTokenizer(Tokenizer):
    """Dream tokenizer; see `Tokenizer` for the arguments."""

    builder: ClassVar[str | None] = "dllm_jepa.models.dream.dream_tokenizer"
    published_names: ClassVar[Mapping[str, str]] = {
        "mask_token": "<|mask|>",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|beginoftext|>",
    }
    chat_tokens: ClassVar[tuple[str, ...]] = ("<|im_start|>", "<|im_end|>")

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        r"""Encode a conversation as Dream Instruct was trained on; see `Tokenizer.encode_chat`.

        For each message `<|im_start|>{role}\n{content}<|im_end|>\n`, without a bos token; the last line break is not
        part of a response. As in the published template, a conversation that does not start with a system message gets
        "You are a helpful assistant." as one.
        Content that starts with a line break is cut from the one after the role, where the template lets them merge.

        Source: chat_template in tokenizer_config.json of Dream-org/Dream-v0-Instruct-7B, without its tool calls.
        """
        check_messages(messages)
        start, end = self._chat_ids()
        line_break = self.encode("\n")
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": _DEFAULT_SYSTEM}, *messages]
        return self._encode_turns(
            messages,
            before=[],
            header=lambda role: [start, *self.encode(role), *line_break],
            end_of_turn=[end, *line_break],
            add_generation_prompt=add_generation_prompt,
        )


def dream_tokenizer(path: str | Path) -> DreamTokenizer:
    """Build the tokenizer of a Dream checkpoint (Base, Instruct, Dream-Coder or DiffuCoder).

    Args:
        path: directory with vocab.json and merges.txt, as published, or with tokenizer.json, which is preferred; and
            tokenizer_config.json.

    Raises:
        CheckpointError: if a file is missing or broken, or there is no mask token.
    """
    return DreamTokenizer.read(path, from_vocabulary=_qwen2_backend)


def _qwen2_backend(directory: Path) -> tokenizers.Tokenizer:
    """Build the byte-level BPE of Qwen2 from vocab.json and merges.txt."""
    vocab, merges = str(directory / "vocab.json"), str(directory / "merges.txt")
    with judged_by_tokenizers(f"{vocab} and {merges}"):
        backend = tokenizers.Tokenizer(models.BPE.from_file(vocab, merges))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CUTS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend
