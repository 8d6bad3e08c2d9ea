"""How denoising is shown: step by step in a terminal, and on a page of its own. Needs only what a decoding yields."""

from dllm_jepa.generation.show._page import CanvasHistory, Denoising, denoising_page, record_denoising
from dllm_jepa.generation.show._pieces import Piece, PieceTokenizer, split_pieces, visible
from dllm_jepa.generation.show._terminal import DenoisingView, encodable, frame_lines, is_terminal

__all__ = [
    "CanvasHistory",
    "Denoising",
    "DenoisingView",
    "Piece",
    "PieceTokenizer",
    "denoising_page",
    "encodable",
    "frame_lines",
    "is_terminal",
    "record_denoising",
    "split_pieces",
    "visible",
]
