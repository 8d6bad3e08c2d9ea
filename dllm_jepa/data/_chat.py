"""Conversations: every assistant turn is a response."""

from collections.abc import Iterator
from typing import Annotated, Any

from annotated_types import Ge

from dllm_jepa.data._examples import ExampleOptions, TooLong
from dllm_jepa.data._sequences import SequenceDataset
from dllm_jepa.data._sources import Row, check_text, read_rows
from dllm_jepa.data._templates import TextTokenizer, format_chat
from dllm_jepa.errors import DataError

_ROLES = ("system", "user", "assistant")


def chat(
    tokenizer: TextTokenizer,
    *,
    source: str,
    max_seq_len: int,
    split: str = "train",
    name: str | None = None,
    system_prompt: str | None = None,
    max_rows: Annotated[int, Ge(1)] | None = None,
    too_long: TooLong = "truncate",
    eos_fill: Annotated[int, Ge(0)] = 0,
    canvas_tokens: Annotated[int, Ge(1)] | None = None,
    mask_prompt: bool = False,
    shift_logits: bool = False,
    progress: bool = True,
) -> SequenceDataset:
    """Conversations: rows with `messages`, a list of {"role": system, user or assistant, "content": text}.

    All assistant turns are maskable, each with the token that ends it; the end-of-text tokens follow the last one.
    Messages behind the last assistant turn are left out, since nothing answers them.

    `system_prompt` takes the place of the row's own system message: "" for none; None leaves the row as it is. With
    `mask_prompt` noise may replace the marks of turns too. All other arguments are those of `gsm8k`.

    Raises:
        DataError: the source or some of its rows cannot be used.
        ValueError: an option is out of range.
    """
    options = ExampleOptions(
        "chat", max_seq_len, too_long, eos_fill, canvas_tokens, mask_prompt, shift_logits, progress
    )

    def examples() -> Iterator[tuple[list[int], list[bool], bool, str]]:
        for row in read_rows(source, fields=["messages"], split=split, name=name, kind=list, max_rows=max_rows):
            messages = _messages(row, system_prompt)
            has_response = any(m["role"] == "assistant" and m["content"].strip() for m in messages)
            yield *format_chat(tokenizer, messages), has_response, row.name

    return options.collect(tokenizer, examples(), source=source, system_prompt=system_prompt)


def _messages(row: Row, system_prompt: str | None) -> list[dict[str, str]]:
    messages = row.values["messages"]
    if not messages:
        raise DataError(f"{row.name}: field 'messages' is empty")
    for number, message in enumerate(messages, start=1):
        _check_message(message, f"{row.name}: message {number}")
    if system_prompt is None:
        return [{"role": message["role"], "content": message["content"]} for message in messages]
    own = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return own + [message for message in messages if message["role"] != "system"]


def _check_message(message: Any, place: str) -> None:
    if not isinstance(message, dict):
        raise DataError(f"{place} is not an object with role and content")
    if message.get("role") not in _ROLES:
        raise DataError(f"{place} has role {message.get('role')!r}, must be one of {', '.join(_ROLES)}")
    if not isinstance(message.get("content"), str):
        raise DataError(f"{place} has no text under 'content'")
    check_text(message["content"], place)
