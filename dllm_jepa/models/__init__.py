"""Backbones of masked diffusion language models: single-device maths, weight names and tokenizers."""

from dllm_jepa.models._families import FAMILIES, Family
from dllm_jepa.models._hf_reader import HFCheckpoint, load_hf
from dllm_jepa.models._hf_writer import SHARD_BYTES, save_hf
from dllm_jepa.models._init import InitialWeights
from dllm_jepa.models._masked_diffusion_lm import Backbone, MaskedDiffusionLM, TransformerSizes, init_rope
from dllm_jepa.models._model_card import model_card
from dllm_jepa.models._tokenizer import Tokenizer

__all__ = [
    "FAMILIES",
    "SHARD_BYTES",
    "Backbone",
    "Family",
    "HFCheckpoint",
    "InitialWeights",
    "MaskedDiffusionLM",
    "Tokenizer",
    "TransformerSizes",
    "init_rope",
    "load_hf",
    "model_card",
    "save_hf",
]
