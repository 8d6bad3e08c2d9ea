"""Tokenized datasets: every sequence with the positions that noise may replace, in flat arrays.

Shape legend: n sequences, T tokens of one of them, N tokens of all.
"""

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from dllm_jepa.errors import DataError

_NUM_NAMED_ROWS = 5
# Share of the sequences above which truncation is more than a few outliers.
_MOST_TRUNCATED = 0.01


class SequenceDataset:
    """Sequences of token ids and their maskable positions.

    Args:
        tokens: int32 [N], all sequences end to end.
        maskable: bool [N], positions that noise may replace.
        offsets: int64 [n + 1], sequence i is offsets[i] to offsets[i + 1].
        source: where the rows came from, for messages.
        prompt: how the prompts were written: `template`, and `system_prompt` (text, "" for none, None where every row
            has its own); None for data without prompts.
        warnings: what the user should know, one line each.
    """

    def __init__(
        self,
        tokens: npt.NDArray[np.int32],
        maskable: npt.NDArray[np.bool_],
        offsets: npt.NDArray[np.int64],
        *,
        num_truncated: int,
        source: str,
        prompt: Mapping[str, str | None] | None = None,
        warnings: Sequence[str] = (),
    ) -> None:
        self.tokens = tokens
        self.maskable = maskable
        self.offsets = offsets
        self.lengths: npt.NDArray[np.int64] = np.diff(offsets)
        self.num_truncated = num_truncated
        self.source = source
        self.prompt = None if prompt is None else dict(prompt)
        self.warnings = list(warnings)

    def fingerprint(self) -> dict[str, str | int]:
        """What identifies this dataset and its tokenizer: `source`, `sequences` and `sha256` of all tokens."""
        digest = hashlib.sha256()
        for values in (self.tokens, self.maskable, self.offsets):
            digest.update(np.ascontiguousarray(values).data)
        return {"source": self.source, "sequences": len(self), "sha256": digest.hexdigest()}

    def __str__(self) -> str:
        """Text for the user."""
        return f"{self.source}: {len(self):,} sequences, {self.num_truncated:,} of them truncated"

    def __len__(self) -> int:
        """Number of sequences, n."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Tokens int32 [T] and maskable bool [T] of one sequence; views of the arrays, not copies."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        index %= len(self)
        span = slice(self.offsets[index], self.offsets[index + 1])
        return self.tokens[span], self.maskable[span]


def build_sequences(
    rows: Iterable[tuple[Sequence[int], Sequence[bool], str]],
    *,
    source: str,
    max_seq_len: int,
    too_long: Literal["truncate", "refuse"],
    shift_logits: bool,
    progress: bool,
    prompt: Mapping[str, str | None] | None = None,
) -> SequenceDataset:
    """Collect encoded rows into a dataset and report every unusable row at once.

    A sequence needs a maskable token and another one beside it, or no view with both a masked and a visible token
    exists.

    Args:
        rows: token ids, maskable positions, and a name such as `train.jsonl line 17`.
        source: where the rows come from, for messages.
        max_seq_len: longest sequence in tokens.
        too_long: what to do with a longer one. Truncation cuts its end and adds no end-of-text token: the response
            goes on there, and to end it would teach the model to stop in mid-sentence.
        shift_logits: the backbone scores a token from the hidden state before it, so that the first token of a
            sequence cannot be scored and is never maskable.
        progress: show a progress bar, if stderr is a terminal.
        prompt: how the prompts were written; see `SequenceDataset`.

    Raises:
        DataError: there is no row, or some cannot be used.
    """
    tokens, maskable, lengths = array("i"), bytearray(), array("q", [0])
    whole_lengths = array("q")  # before truncation
    problems: list[str] = []
    # None switches the bar off where there is no terminal to draw it on.
    bar = tqdm(rows, desc=f"tokenizing {source}", unit=" rows", disable=None if progress else True)
    for row_tokens, row_maskable, name in bar:
        flags = bytearray(row_maskable[:max_seq_len])
        if shift_logits and flags:
            flags[0] = 0
        if problem := _problem(len(row_tokens), any(flags), max_seq_len, too_long):
            problems.append(f"{name}: {problem}")
            continue
        whole_lengths.append(len(row_tokens))
        tokens.extend(row_tokens[:max_seq_len])
        maskable.extend(flags)
        lengths.append(len(flags))
    if problems:
        raise DataError(_describe(problems, source))
    if len(lengths) == 1:
        raise DataError(f"{source} has no rows")
    wanted = np.frombuffer(whole_lengths, dtype=np.int64)
    return SequenceDataset(
        np.frombuffer(tokens, dtype=np.int32),
        np.frombuffer(maskable, dtype=np.bool_),
        np.cumsum(np.frombuffer(lengths, dtype=np.int64)),
        num_truncated=int((wanted > max_seq_len).sum()),
        source=source,
        prompt=prompt,
        warnings=_truncation_warnings(wanted, max_seq_len),
    )


def _truncation_warnings(lengths: npt.NDArray[np.int64], max_seq_len: int) -> list[str]:
    """One line if more sequences are cut than a few outliers; `lengths` are those before."""
    share = float((lengths > max_seq_len).mean())
    if share <= _MOST_TRUNCATED:
        return []
    # Lengths that occur, so that a max_seq_len of the last one but one really holds 99 % of the sequences.
    half, most, nearly_all, longest = np.quantile(lengths, [0.5, 0.9, 0.99, 1.0], method="inverted_cdf").tolist()
    return [
        f"{share:.1%} of the sequences are cut to max_seq_len={max_seq_len} and do not learn to end; of all, 50 % have "
        f"at most {half} tokens, 90 % {most}, 99 % {nearly_all}, and the longest has {longest}: "
        f"max_seq_len={nearly_all} fits 99 %"
    ]


def _problem(num_tokens: int, has_maskable: bool, max_seq_len: int, too_long: str) -> str | None:
    """Why a row cannot be used; None if it can."""
    is_too_long = num_tokens > max_seq_len
    if is_too_long and too_long == "refuse":
        return f"{num_tokens} tokens, above max_seq_len {max_seq_len} (raise it, or set too_long to truncate)"
    if not has_maskable and is_too_long:
        return f"no maskable token is left of its {num_tokens} tokens at max_seq_len {max_seq_len}"
    if not has_maskable:
        return "no maskable token: there is no response to train on"
    if num_tokens < 2:
        return "its only token has nothing beside it: a view needs a masked and a visible token"
    return None


def _describe(problems: Sequence[str], source: str) -> str:
    more = len(problems) - _NUM_NAMED_ROWS
    rows = "row" if len(problems) == 1 else "rows"
    lines = [f"{source}: {len(problems)} {rows} cannot be used", *problems[:_NUM_NAMED_ROWS]]
    return "\n  ".join([*lines, f"and {more} more"] if more > 0 else lines)
