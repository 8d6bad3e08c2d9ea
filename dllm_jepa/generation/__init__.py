"""Decoding: from prompts to generated tokens. `show` has what makes the denoising visible."""

from dllm_jepa.generation._builders import dream_decoding, llada_decoding
from dllm_jepa.generation._decoding import Decoding, DenoisingStep, Generation
from dllm_jepa.generation._sampling import CONFIDENCES, RowNoise, Sampling
from dllm_jepa.generation._schedules import EvenSpread, Factor, NoiseLevels, Schedule, SpeedUp, Threshold
from dllm_jepa.generation._scoring import DenoisingModel

__all__ = [
    "CONFIDENCES",
    "Decoding",
    "DenoisingModel",
    "DenoisingStep",
    "EvenSpread",
    "Factor",
    "Generation",
    "NoiseLevels",
    "RowNoise",
    "Sampling",
    "Schedule",
    "SpeedUp",
    "Threshold",
    "dream_decoding",
    "llada_decoding",
]
