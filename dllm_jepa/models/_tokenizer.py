"""The tokenizer of a masked diffusion language model: text and chats to token ids and back."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import tokenizers

from dllm_jepa.errors import CheckpointError
from dllm_jepa.models.files._tokenizer_files import (
    ADDED_TOKEN_FLAGS,
    BUILDER_KEY,
    CONFIG_NAME,
    TOKENIZER_NAME,
    read_backend,
    read_special_tokens,
)

ROLES = ("system", "user", "assistant")


class Tokenizer:
    """Text to token ids and back, with a mask token.

    Attributes:
        vocab_size: highest id that has a token, plus one.
        token_ids: the ids that have a token, ascending. A model may score more ids than these; never sample the others.
        mask_id: id of the mask token.
        eos_id: id of the end-of-text token.
        pad_id: id of the padding token.
        bos_id: id of the token in front of a text, or None.
        end_ids: ids that end a response: end of text and, where the vocabulary has it, end of turn.

    Args:
        backend: tokenizer of the `tokenizers` library. It is taken over: truncation and padding are switched off and
            the special tokens are marked as such.
        mask_token: name of the mask token.
        eos_token: name of the end-of-text token.
        pad_token: name of the padding token; None pads with `eos_token`.
        bos_token: name of the token in front of a text; None if there is none.

    Raises:
        ValueError: if one of the names is not in the vocabulary.
    """

    chat_tokens: ClassVar[tuple[str, ...]] = ()
    """Names of the tokens that mark the turns of a chat, where the family has a chat format; the last ends a turn."""

    builder: ClassVar[str | None] = None
    """Path of the function that makes such a tokenizer of a directory; saved beside it, so that it is found again."""

    published_names: ClassVar[Mapping[str, str]] = {}
    """The family's special tokens by argument, for checkpoints whose files do not name them."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        mask_token: str,
        eos_token: str,
        pad_token: str | None = None,
        bos_token: str | None = None,
    ) -> None:
        pad_token = eos_token if pad_token is None else pad_token
        self._names = {"mask_token": mask_token, "eos_token": eos_token, "pad_token": pad_token}
        if bos_token is not None:
            self._names["bos_token"] = bos_token
        vocab = backend.get_vocab()
        if absent := [f"{key} {name!r}" for key, name in self._names.items() if name not in vocab]:
            raise ValueError(f"not in the vocabulary: {', '.join(absent)}")
        ids = {key: vocab[name] for key, name in self._names.items()}
        chat = [name for name in self.chat_tokens if name in vocab]
        backend.add_special_tokens([*self._names.values(), *chat])
        # A published tokenizer.json may carry the lengths of its last use, which would cut a text without a word.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.token_ids: list[int] = sorted(set(vocab.values()))
        self.vocab_size: int = self.token_ids[-1] + 1
        self.mask_id: int = ids["mask_token"]
        self.eos_id: int = ids["eos_token"]
        self.pad_id: int = ids["pad_token"]
        self.bos_id: int | None = ids.get("bos_token")
        self.end_ids = frozenset([self.eos_id, *(vocab[name] for name in chat if name == self.chat_tokens[-1])])

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy in another process."""
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # is not pickled

    @classmethod
    def read(cls, path: str | Path, from_vocabulary: Callable[[Path], tokenizers.Tokenizer] | None = None) -> Self:
        """The tokenizer of a checkpoint directory; see `read_backend` and `read_special_tokens`."""
        backend = read_backend(path, from_vocabulary)
        return cls(backend, **read_special_tokens(Path(path), backend, cls.published_names))

    def agrees_with(self, other: "Tokenizer") -> bool:
        """Whether ids mean the same in both: the mask has one id, and so has every token that both name."""
        own, others = self._backend.get_vocab(), other._backend.get_vocab()
        return self.mask_id == other.mask_id and all(own[name] == others[name] for name in own.keys() & others.keys())

    def encode(self, text: str) -> list[int]:
        """Encode a text, without bos and eos. The name of a special token in it stays text: no such id is returned."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        for special_id in self._special_ids.intersection(ids):
            # Only a model that looks up whole words gets here, with a special token among its words: cut that in two.
            name = str(self._backend.id_to_token(special_id))
            if name in text and len(name) > 1:
                first, *others, last = text.split(name)
                pieces = [first + name[0], *(name[1:] + other + name[0] for other in others), name[1:] + last]
                return [token_id for piece in pieces for token_id in self.encode(piece)]
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Decode token ids, each >= 0; ids without a token yield nothing, bytes that are not UTF-8 U+FFFD."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Encode a conversation in the family's chat format.

        Content is encoded apart from the markup, so the border of a response is exact, and the encoding of a
        conversation up to an answer (with `add_generation_prompt`) is a prefix of the encoding with the answer.

        Args:
            messages: at least one {"role": "system" | "user" | "assistant", "content": text}.
            add_generation_prompt: whether to append the header of an assistant message, for the model to go on from.

        Returns:
            Token ids, and `response` of the same length: True on the content of assistant messages and on the token
            that ends their turn. No eos is appended.

        Raises:
            ValueError: if there is no message, or one has an unknown role or no text.
            CheckpointError: if the checkpoint has no chat format.
        """
        raise CheckpointError("this tokenizer has no chat format; use `template: plain`")

    def _encode_turns(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        before: list[int],
        header: Callable[[str], list[int]],
        end_of_turn: list[int],
        add_generation_prompt: bool,
    ) -> tuple[list[int], list[bool]]:
        """Join turns of `header(role)`, content, `end_of_turn`, whose first id belongs to the response."""
        ids = list(before)
        response = [False] * len(before)
        for message in messages:
            turn = header(message["role"])
            response += [False] * len(turn)
            content = self.encode(message["content"])
            response += [message["role"] == "assistant"] * (len(content) + 1) + [False] * (len(end_of_turn) - 1)
            ids += turn + content + end_of_turn
        if add_generation_prompt:
            ids += header("assistant")
        return ids, response + [False] * (len(ids) - len(response))

    def _chat_ids(self) -> list[int]:
        """Ids of `chat_tokens`, in that order."""
        ids = {name: self._backend.token_to_id(name) for name in self.chat_tokens}
        if absent := [name for name, token_id in ids.items() if token_id is None]:
            raise CheckpointError(
                f"this is the tokenizer of a base model: it has no chat tokens {', '.join(absent)}. Use "
                "`template: plain`, or the tokenizer files of the Instruct checkpoint"
            )
        return [token_id for token_id in ids.values() if token_id is not None]

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, from which the family's builder makes an equal tokenizer."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        added = self._backend.get_added_tokens_decoder()
        config = {
            **self._names,
            "added_tokens_decoder": {
                str(token_id): {"content": token.content} | {flag: getattr(token, flag) for flag in ADDED_TOKEN_FLAGS}
                for token_id, token in sorted(added.items())
            },
            "clean_up_tokenization_spaces": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
        }
        if self.builder is not None:
            config[BUILDER_KEY] = self.builder
        (directory / TOKENIZER_NAME).write_text(self._backend.to_str(pretty=True), encoding="utf-8")
        (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    """Refuse what is not a conversation with a ValueError."""
    if not messages:
        raise ValueError("messages is empty: a chat has at least one message")
    for index, message in enumerate(messages):
        if message.get("role") not in ROLES:
            raise ValueError(f"message {index} has role {message.get('role')!r}; allowed are {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"message {index} has no text under 'content'")
