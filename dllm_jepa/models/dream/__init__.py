"""Dream: builders, tokenizer and published names."""

from dllm_jepa.models.dream._builders import dream, dream_7b, lora_dream, lora_dream_7b, qlora_dream_7b
from dllm_jepa.models.dream._tokenizer import DreamTokenizer, dream_tokenizer

__all__ = ["DreamTokenizer", "dream", "dream_7b", "dream_tokenizer", "lora_dream", "lora_dream_7b", "qlora_dream_7b"]
