"""Plain text for continued training."""

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from annotated_types import Ge

from dllm_jepa.data._examples import check_choice, check_max_seq_len
from dllm_jepa.data._sequences import SequenceDataset, build_sequences
from dllm_jepa.data._sources import read_rows
from dllm_jepa.data._templates import TextTokenizer

TooLongText = Literal["chunk", "truncate", "refuse"]


def text(
    tokenizer: TextTokenizer,
    *,
    source: str,
    max_seq_len: int,
    split: str = "train",
    name: str | None = None,
    max_rows: Annotated[int, Ge(1)] | None = None,
    too_long: TooLongText = "chunk",
    shift_logits: bool = False,
    progress: bool = True,
) -> SequenceDataset:
    """Documents: rows with `text`. Every token but the bos is maskable.

    A document is its tokens and one end-of-text token, with a bos in front if the tokenizer has one. Blank documents,
    of which some corpora have many, are left out. One of more than `max_seq_len` tokens, bos included, is by `too_long`
    cut into sequences of so many tokens and a rest, each with its own bos (`chunk`), cut to the first of them, without
    end-of-text token (`truncate`), or refused (`refuse`). All other arguments are those of `gsm8k`.

    Raises:
        DataError: the source or some of its rows cannot be used.
        ValueError: an option is out of range.
    """
    check_choice("too_long", too_long, get_args(TooLongText))
    check_max_seq_len(max_seq_len)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]

    def sequences() -> Iterator[tuple[list[int], list[bool], str]]:
        for row in read_rows(source, fields=["text"], split=split, name=name, max_rows=max_rows):
            if not row.values["text"].strip():
                continue
            document = [*tokenizer.encode(row.values["text"]), tokenizer.eos_id]
            size = max_seq_len - len(bos) if too_long == "chunk" else len(document)
            for chunk in split_chunks(document, size):
                yield bos + chunk, [False] * len(bos) + [True] * len(chunk), row.name

    return build_sequences(
        sequences(),
        source=source,
        max_seq_len=max_seq_len,
        too_long="refuse" if too_long == "refuse" else "truncate",
        shift_logits=shift_logits,
        progress=progress,
    )


def split_chunks(document: list[int], size: int) -> list[list[int]]:
    """Cut a document of two tokens or more into chunks of `size` (at least 3) and a rest, none of them a single token.

    A rest of one token takes a second one from the chunk before it: alone it could not be trained.
    """
    cuts = list(range(0, len(document), size))
    if len(cuts) > 1 and len(document) - cuts[-1] == 1:
        cuts[-1] -= 1
    return [document[start:end] for start, end in zip(cuts, [*cuts[1:], len(document)], strict=True)]
