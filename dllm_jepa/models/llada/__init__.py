"""LLaDA: builders, tokenizer and published names."""

from dllm_jepa.models.llada._builders import llada, llada_8b, lora_llada, lora_llada_8b, qlora_llada_8b
from dllm_jepa.models.llada._tokenizer import LLaDATokenizer, llada_tokenizer

__all__ = ["LLaDATokenizer", "llada", "llada_8b", "llada_tokenizer", "lora_llada", "lora_llada_8b", "qlora_llada_8b"]
