"""Backbones of masked diffusion language models: single-device maths, weight names and tokenizers."""

from dllm_jepa.models._families import BUILT_IN_TOKENIZER, FAMILIES, Family, find_tokenizer, known_tokenizers
from dllm_jepa.models._float8 import use_float8
from dllm_jepa.models._flops import step_flops
from dllm_jepa.models._init import InitialWeights
from dllm_jepa.models._layers import choose_packed_attention, init_rope, set_packed_attention
from dllm_jepa.models._linear_cross_entropy import TokenLosses, linear_cross_entropy
from dllm_jepa.models._lora import LoRAWeights, adapted_modules, add_lora, is_adapter
from dllm_jepa.models._masked_diffusion_lm import Backbone, MaskedDiffusionLM
from dllm_jepa.models._sizes import DTYPES, LoRASettings, TransformerSizes
from dllm_jepa.models._tokenizer import Tokenizer
from dllm_jepa.models.files._card import model_card
from dllm_jepa.models.files._directory import Prompt, check_prompt, read_prompt
from dllm_jepa.models.files._merge import merged_weights, save_merged
from dllm_jepa.models.files._peft import (
    OpenedAdapter,
    is_adapter_directory,
    load_adapter,
    save_adapter,
)
from dllm_jepa.models.files._reader import HFCheckpoint, load_hf
from dllm_jepa.models.files._tokenizer_files import tokenizer_builder
from dllm_jepa.models.files._writer import SHARD_BYTES, save_hf

__all__ = [
    "DTYPES",
    "BUILT_IN_TOKENIZER",
    "FAMILIES",
    "SHARD_BYTES",
    "Backbone",
    "Family",
    "HFCheckpoint",
    "InitialWeights",
    "LoRASettings",
    "LoRAWeights",
    "MaskedDiffusionLM",
    "OpenedAdapter",
    "Prompt",
    "TokenLosses",
    "Tokenizer",
    "TransformerSizes",
    "adapted_modules",
    "add_lora",
    "check_prompt",
    "choose_packed_attention",
    "find_tokenizer",
    "init_rope",
    "is_adapter",
    "is_adapter_directory",
    "known_tokenizers",
    "linear_cross_entropy",
    "load_adapter",
    "load_hf",
    "merged_weights",
    "model_card",
    "read_prompt",
    "save_adapter",
    "save_hf",
    "save_merged",
    "set_packed_attention",
    "step_flops",
    "tokenizer_builder",
    "use_float8",
]
