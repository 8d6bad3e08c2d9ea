"""Held-out diffusion loss: how well a model fills in text that it was not trained on.

The text is cut into chunks, and every chunk is masked `num_strata` times. The masks depend on the text and the seed
alone, so that two models are compared under the same ones: nearly all of the noise, which is the choice of the masks,
then cancels out of their difference.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_jepa.data import read_rows
from dllm_jepa.errors import ConfigError, DataError
from dllm_jepa.evals._masked_rows import MaskedRow, candidate_log_probs, draw_masked
from dllm_jepa.evals._task import ItemResult, Score, sha256_of
from dllm_jepa.models import MaskedDiffusionLM, Tokenizer

NUM_BANDS = 5
"""Bands of the mask ratio: (0, 0.2], (0.2, 0.4], ..., (0.8, 1]."""


@dataclass(frozen=True)
class HeldoutTask:
    """Chunks of text and their losses; made by `heldout_task`.

    An item's `loss` is the mean over its strata of the mean cross-entropy of the masked tokens, in nats per token. With
    l masked tokens out of L, weighted by L / l as the bound on the likelihood has it, that is an unbiased estimate of
    the bound, divided by L. `loss_0.0_0.2` and so on are the same mean over the strata whose share of masked tokens
    lies in that band.

    Args:
        chunks: token ids of every item, all of one length.
        num_strata: maskings of each chunk.
        num_left_out: tokens behind the last whole chunk.
    """

    chunks: Sequence[Sequence[int]] = field(repr=False)
    tokenizer: Tokenizer
    num_strata: int
    seed: int
    num_left_out: int

    @property
    def lengths(self) -> list[int]:
        """Tokens of every chunk."""
        return [len(chunk) for chunk in self.chunks]

    def check_context(self, max_seq_len: int) -> None:
        """Refuse chunks that do not fit into a model; see `EvalTask`."""
        if len(self.chunks[0]) > max_seq_len:
            raise ConfigError(
                f"task.chunk_tokens: {len(self.chunks[0])} given, but the model's context is {max_seq_len}: lower it"
            )

    def fingerprint(self) -> dict[str, Any]:
        """What identifies this evaluation; see `EvalTask`."""
        return {
            "task": "heldout",
            "num_items": len(self.chunks),
            "data_sha256": sha256_of(self.chunks),
            "chunk_tokens": len(self.chunks[0]),
            "num_strata": self.num_strata,
            "seed": self.seed,
        }

    def remarks(self) -> dict[str, Any]:
        """What a reader of the scores has to know; see `EvalTask`."""
        return {"unit": "nats per token", "tokens_left_out_at_the_end": self.num_left_out}

    def evaluate(self, model: MaskedDiffusionLM, items: Sequence[int], *, batch_size: int) -> list[ItemResult]:
        """Losses of some chunks; see `EvalTask`. The record has the `text`."""
        rows = [row for item in items for row in self._rows(item)]
        log_probs = candidate_log_probs(model, rows, mask_id=self.tokenizer.mask_id, batch_size=batch_size)
        losses = [-float(of_row.double().mean()) for of_row in log_probs]
        results = []
        for number, item in enumerate(items):
            strata = slice(number * self.num_strata, (number + 1) * self.num_strata)
            score = _score([len(row.masked) for row in rows[strata]], losses[strata], len(self.chunks[item]) - 1)
            num_scored = sum(len(row.masked) for row in rows[strata])
            record = {"text": self.tokenizer.decode(self.chunks[item])}
            results.append(ItemResult(item, f"chunk {item}", score, num_scored, record))
        return results

    def _rows(self, item: int) -> Iterator[MaskedRow]:
        """The maskings of a chunk. Its first token is never masked: a shifted model cannot score it."""
        chunk = self.chunks[item]
        key = f"{self.seed} {item} {sha256_of(chunk)}"
        for stratum in range(self.num_strata):
            masked = draw_masked(key, stratum, self.num_strata, len(chunk) - 1)
            yield MaskedRow(chunk, [1 + position for position in masked])


def heldout_task(
    tokenizer: Tokenizer,
    *,
    source: str,
    seed: int,
    split: str = "test",
    name: str | None = None,
    field: str = "text",
    chunk_tokens: int = 512,
    num_strata: int = 16,
    max_items: int | None = None,
    progress: bool = True,
) -> HeldoutTask:
    """Text, cut into chunks.

    Documents are joined to one text, each on a line of its own, and encoded as a whole; blank ones stay, as empty
    lines. A chunk is `chunk_tokens` tokens with the bos in front, if the tokenizer has one, counted in; what is left
    behind the last whole chunk is left out. The first token of a chunk is never masked, be it a bos or not.

    Args:
        tokenizer: the model's tokenizer.
        source: a .txt file, a .jsonl or .json file with one object per line, or a hub dataset.
        seed: seed of the masks.
        split: split of a hub dataset.
        name: configuration of a hub dataset, such as `wikitext-2-raw-v1` of Salesforce/wikitext.
        field: the field of a row that holds its text.
        chunk_tokens: tokens of a chunk, at least 2.
        num_strata: maskings of each chunk, at least 1.
        max_items: only the first so many chunks; None for all.
        progress: not used: there is nothing to wait for.

    Raises:
        DataError: the source cannot be used, or is shorter than one chunk.
        ValueError: a number is out of range.
    """
    if chunk_tokens < 2:
        raise ValueError(f"chunk_tokens must be at least 2, got {chunk_tokens}: the first token is never masked")
    if num_strata < 1:
        raise ValueError(f"num_strata must be at least 1, got {num_strata}")
    if max_items is not None and max_items < 1:
        raise ValueError(f"max_items must be at least 1, got {max_items}")
    token_ids = tokenizer.encode(_read_text(source, split, name, field))
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    size = chunk_tokens - len(bos)
    num_chunks = len(token_ids) // size
    if num_chunks == 0:
        raise DataError(
            f"{source} has {len(token_ids)} tokens, fewer than the {size} of one chunk (chunk_tokens={chunk_tokens}): "
            "lower chunk_tokens or take more text"
        )
    chunks = [bos + token_ids[number * size : (number + 1) * size] for number in range(num_chunks)[:max_items]]
    return HeldoutTask(chunks, tokenizer, num_strata, seed, len(token_ids) - num_chunks * size)


def _score(num_masked: Sequence[int], losses: Sequence[float], num_maskable: int) -> Score:
    """Mean over all strata, and over those of each band."""
    bands = defaultdict(list)
    for count, loss in zip(num_masked, losses, strict=True):
        bands[(NUM_BANDS * count - 1) // num_maskable].append(loss)
    measures: dict[str, float | None] = {"loss": math.fsum(losses) / len(losses)}
    for band in range(NUM_BANDS):
        name = f"loss_{band / NUM_BANDS:.1f}_{(band + 1) / NUM_BANDS:.1f}"
        measures[name] = math.fsum(bands[band]) / len(bands[band]) if bands[band] else None
    return Score(measures)


def _read_text(source: str, split: str, name: str | None, field: str) -> str:
    path = Path(source)
    if path.is_file() and path.suffix not in (".txt", ".jsonl", ".json"):
        raise DataError(
            f"{source} must be named .txt if it is plain text, or .jsonl or .json if it has one object per line: "
            "rename or copy it"
        )
    if path.suffix != ".txt":
        documents = (row.values[field] for row in read_rows(source, fields=[field], split=split, name=name))
        return "".join(document if document.endswith("\n") else document + "\n" for document in documents)
    if name is not None:
        raise DataError(f"{source} is a file: `name` (here {name!r}) is for datasets on the hub, set it to null")
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise DataError(f"text file {path} does not exist (looked for {path.absolute()})") from error
    except OSError as error:
        raise DataError(f"text file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path} line {line} is not UTF-8 (byte {error.start + 1} of the file)") from error
