"""A page on which the denoising of responses can be stepped through, in one file and without a network."""

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dllm_jepa.generation._pieces import PieceTokenizer, split_pieces, visible

_TEMPLATE = Path(__file__).with_suffix(".html")
# Inside a script element only `<` can end it; the others are for good measure, and mean the same in JSON.
_ESCAPES = str.maketrans({character: f"\\u{ord(character):04x}" for character in "<>&"})


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
        prompt: what was asked.
        cells: the canvas.
        num_steps: the step that filled the last one of it.
    """

    prompt: str
    cells: Sequence[Cell]
    num_steps: int


def record_denoising(
    tokenizer: PieceTokenizer, prompt: str, canvas: Sequence[int], filled_at: Sequence[int]
) -> Denoising:
    """From a canvas at the end, and when its tokens were filled in, to what the page shows.

    Args:
        tokenizer: the model's tokenizer.
        prompt: what was asked.
        canvas: token ids; masks where none was filled in.
        filled_at: the step that filled each token, from 1; 0 where none did.
    """
    cells = []
    for piece in split_pieces(tokenizer, canvas):
        step = max(filled_at[piece.start : piece.end])
        cells.append(Cell(visible(piece.text), step or None, piece.kind == "end"))
    return Denoising(visible(prompt), cells, max(filled_at))


def denoising_page(denoisings: Sequence[Denoising], *, facts: Mapping[str, str]) -> str:
    """The page, as HTML.

    Args:
        denoisings: what to show, one after the other; at least one.
        facts: what the reader should know of model and decoding, by name.
    """
    data = json.dumps([asdict(denoising) for denoising in denoisings]).translate(_ESCAPES)
    escaped = {html.escape(name): html.escape(visible(value)) for name, value in facts.items()}
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in escaped.items())
    before, between, after = _template_parts()
    return f"{before}{items}{between}{data}{after}"


def _template_parts() -> tuple[str, str, str]:
    """The template before the facts, between these and the data, and after."""
    before, rest = _TEMPLATE.read_text(encoding="utf-8").split("<!--facts-->")
    between, after = rest.split("<!--data-->")
    return before, between, after
