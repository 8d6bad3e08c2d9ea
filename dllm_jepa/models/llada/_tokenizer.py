"""The tokenizer of LLaDA: Llama-3 style chats."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models._tokenizer import Tokenizer, check_messages


class LLaDATokenizer(Tokenizer):
    """LLaDA tokenizer; see `Tokenizer` for the arguments."""

    builder: ClassVar[str | None] = "dllm_jepa.models.llada.llada_tokenizer"
    published_names: ClassVar[Mapping[str, str]] = {
        "mask_token": "<|mdm_mask|>",
        "eos_token": "<|endoftext|>",
        "bos_token": "<|startoftext|>",
    }
    chat_tokens: ClassVar[tuple[str, ...]] = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        r"""Encode a conversation as LLaDA Instruct was trained on; see `Tokenizer.encode_chat`.

        `<|startoftext|>` once, then for each message
        `<|start_header_id|>{role}<|end_header_id|>\n\n{content, stripped}<|eot_id|>`. There is no default system
        message. The published template appends the header of an assistant message even after an answer; here it is
        appended only with `add_generation_prompt`.

        Source: chat_template in tokenizer_config.json of GSAI-ML/LLaDA-8B-Instruct.
        """
        check_messages(messages)
        start_header, end_header, end_of_turn = self._chat_ids()
        if self.bos_id is None:
            raise CheckpointError(
                "a LLaDA chat starts with the bos token, but tokenizer_config.json names no bos_token"
            )
        return self._encode_turns(
            [{"role": message["role"], "content": message["content"].strip()} for message in messages],
            before=[self.bos_id],
            header=lambda role: [start_header, *self.encode(role), end_header, *self.encode("\n\n")],
            end_of_turn=[end_of_turn],
            add_generation_prompt=add_generation_prompt,
        )


def llada_tokenizer(path: str | Path) -> LLaDATokenizer:
    """Build the tokenizer of a LLaDA checkpoint (Base, Instruct or 1.5).

    Args:
        path: directory with tokenizer.json and, as published, tokenizer_config.json.

    Raises:
        CheckpointError: if a file is missing or broken, or there is no mask token.
    """
    return LLaDATokenizer.read(path)
