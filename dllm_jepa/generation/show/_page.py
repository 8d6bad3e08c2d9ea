"""What was filled in on each canvas, and when, and a page to step through it, in one file and without a network.

Shape legend: B rows, G tokens of a canvas.
"""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dllm_jepa.generation.show._pieces import PieceTokenizer, split_pieces, visible

_TEMPLATE = Path(__file__).with_suffix(".html")
# Inside a script element only `<` can end it; the others are for good measure, and mean the same in JSON.
_ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&"})


class CanvasHistory:
    """Follows the canvases of a decoding step by step.

    Attributes:
        tokens: int64 [B, G] on the CPU, the tokens as they were sampled; masks where none was. Behind the end of a
            response a decoding leaves padding, which is not sampled.
        filled_at: int64 [B, G], the step that filled each token, from 1; 0 where none did.
        num_steps: steps so far.
    """

    def __init__(self, num_rows: int, *, gen_length: int, block_length: int, mask_id: int) -> None:
        self.tokens = torch.full((num_rows, gen_length), mask_id)
        self.filled_at = torch.zeros_like(self.tokens)
        self.num_steps = 0
        self._mask_id = mask_id
        self._masked = torch.ones_like(self.tokens, dtype=torch.bool)
        self._blocks = torch.arange(gen_length) // block_length

    def add(self, canvas: Tensor) -> None:
        """Take in the canvases, int64 [B, G] on the CPU, after one more step."""
        self.num_steps += 1
        masked = canvas == self._mask_id
        is_new = self._masked & ~masked
        self._masked = masked
        # What appears in later blocks at the same time is the padding of rows that are finished.
        first_block = self._blocks[is_new.any(0)].min() if is_new.any() else 0
        is_new &= self._blocks == first_block
        self.tokens[is_new] = canvas[is_new]
        self.filled_at[is_new] = self.num_steps


@dataclass(frozen=True)
class Cell:
    """A piece of a canvas.

    Args:
        text: its text once it is filled in; "" if it never is.
        step: the step that filled it, from 1; None if none did.
        is_end: whether it is a token that ends a response.
    """

    text: str
    step: int | None
    is_end: bool = False


@dataclass(frozen=True)
class Denoising:
    """How one canvas was filled.

    Args:
        num_steps: the step that filled the last one of it.
    """

    prompt: str
    cells: Sequence[Cell]
    num_steps: int


def record_denoising(
    tokenizer: PieceTokenizer, prompt: str, canvas: Sequence[int], filled_at: Sequence[int]
) -> Denoising:
    """What the page shows, from a canvas at the end and the steps that filled its tokens (from 1; 0 where none did)."""
    cells = []
    for piece in split_pieces(tokenizer, canvas):
        step = max(filled_at[piece.start : piece.end])
        cells.append(Cell(visible(piece.text), step or None, piece.kind == "end"))
    return Denoising(visible(prompt), cells, max(filled_at))


def denoising_page(denoisings: Sequence[Denoising], *, facts: Mapping[str, str]) -> str:
    """The page, as HTML; `facts` are what the reader should know of model and decoding, by name."""
    data = json.dumps([asdict(denoising) for denoising in denoisings]).translate(_ESCAPES)
    escaped = {html.escape(name): html.escape(visible(value)) for name, value in facts.items()}
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in escaped.items())
    before, rest = _TEMPLATE.read_text(encoding="utf-8").split("<!--facts-->")
    between, after = rest.split("<!--data-->")
    return f"{before}{items}{between}{data}{after}"
