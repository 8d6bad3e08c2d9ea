"""From system prompt, question and response to token ids: one code for training and evaluation."""

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

Template = Literal["chat", "plain"]


class TextTokenizer(Protocol):
    """What the data package needs of a tokenizer."""

    eos_id: int
    bos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens."""

    def encode_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them belong to an assistant's message or the end of its turn."""


def format_prompt(
    tokenizer: TextTokenizer,
    *,
    system: str | None,
    shots: Sequence[tuple[str, str]] = (),
    question: str,
    template: Template,
) -> list[int]:
    r"""Token ids of everything that stands in front of a response.

    `chat` is the tokenizer's chat format: system message, a user and an assistant turn per shot, the question, and the
    header of the answer. `plain`, for base checkpoints, is bos (if the tokenizer has one) and
    `{system}\n\n{question}\n{response}\n\n{question}\n`, with every response encoded apart from what surrounds it, as
    in training. Shots are solved examples, (question, response); "" or None is no system prompt.
    """
    if template == "chat":
        return tokenizer.encode_chat(_messages(system, shots, question), add_generation_prompt=True)[0]
    token_ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    lead = f"{system}\n\n" if system else ""
    for shot_question, shot_response in shots:
        token_ids += tokenizer.encode(f"{lead}{shot_question}\n") + tokenizer.encode(shot_response)
        lead = "\n\n"
    return token_ids + tokenizer.encode(f"{lead}{question}\n")


def format_example(
    tokenizer: TextTokenizer, *, system: str | None, question: str, response: str, template: Template
) -> tuple[list[int], list[bool]]:
    """Encode one training example: what `format_prompt` gives, and the response behind it.

    Returns:
        Token ids, and `maskable` of the same length: True on the response and, in a chat, the end of its turn. There
        is no end-of-text token yet; `close_response` appends it.
    """
    if template == "chat":
        return format_chat(tokenizer, [*_messages(system, (), question), {"role": "assistant", "content": response}])
    prompt = format_prompt(tokenizer, system=system, question=question, template=template)
    response_ids = tokenizer.encode(response)
    return prompt + response_ids, [False] * len(prompt) + [True] * len(response_ids)


def format_chat(tokenizer: TextTokenizer, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[bool]]:
    """Encode a conversation up to the end of its last assistant turn.

    What stands behind that is left out: messages that nobody answers, and the blank that some formats put after a
    turn. Seen in training, it would give away where the response ends.

    Returns:
        Token ids, and `maskable` of the same length: True on assistant messages and the ends of their turns. Without
        an assistant message the whole conversation, nothing of it maskable.
    """
    tokens, response = tokenizer.encode_chat(messages)
    end = next((end for end in range(len(response), 0, -1) if response[end - 1]), len(response))
    return tokens[:end], response[:end]


def close_response(
    tokenizer: TextTokenizer,
    tokens: list[int],
    maskable: list[bool],
    *,
    eos_fill: int,
    canvas_tokens: int | None,
    max_seq_len: int,
) -> tuple[list[int], list[bool]]:
    """Append the end-of-text tokens of the last response; they are maskable.

    There are `eos_fill` of them, or as many as fill the response up to `canvas_tokens`, the length of a generation
    canvas, and at least one, even where it makes the sequence longer than `max_seq_len`: such a sequence is too long,
    and truncating or refusing it is the caller's choice. The fill beyond the first one never does.
    """
    num_eos = eos_fill
    if canvas_tokens is not None:
        # maskable starts at 0, so that a sequence without any False is all response.
        response_start = next((end for end in range(len(maskable), 0, -1) if not maskable[end - 1]), 0)
        num_eos = canvas_tokens - (len(maskable) - response_start)
    num_eos = max(1, min(num_eos, max_seq_len - len(tokens)))
    return tokens + [tokenizer.eos_id] * num_eos, maskable + [True] * num_eos


def _messages(system: str | None, shots: Sequence[tuple[str, str]], question: str) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": system}] if system else []
    for shot_question, shot_response in shots:
        messages.append({"role": "user", "content": shot_question})
        messages.append({"role": "assistant", "content": shot_response})
    return [*messages, {"role": "user", "content": question}]
