"""Decoding: from prompts to generated tokens, and how the denoising is shown."""

from dllm_jepa.generation._builders import dream_decoding, llada_decoding
from dllm_jepa.generation._decoding import Decoding, DenoisingStep, Generation
from dllm_jepa.generation._history import CanvasHistory
from dllm_jepa.generation._noise import RowNoise
from dllm_jepa.generation._page import Denoising, denoising_page, record_denoising
from dllm_jepa.generation._pieces import Piece, PieceTokenizer, split_pieces, visible
from dllm_jepa.generation._sampling import CONFIDENCES, Sampling
from dllm_jepa.generation._schedules import EvenSpread, Factor, NoiseLevels, Schedule, SpeedUp, Threshold
from dllm_jepa.generation._scoring import DenoisingModel
from dllm_jepa.generation._terminal import DenoisingView, encodable, frame_lines, is_terminal

__all__ = [
    "CONFIDENCES",
    "CanvasHistory",
    "Decoding",
    "Denoising",
    "DenoisingModel",
    "DenoisingStep",
    "DenoisingView",
    "EvenSpread",
    "Factor",
    "Generation",
    "NoiseLevels",
    "Piece",
    "PieceTokenizer",
    "RowNoise",
    "Sampling",
    "Schedule",
    "SpeedUp",
    "Threshold",
    "denoising_page",
    "dream_decoding",
    "encodable",
    "frame_lines",
    "is_terminal",
    "llada_decoding",
    "record_denoising",
    "split_pieces",
    "visible",
]
