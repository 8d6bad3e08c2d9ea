"""A small tokenizer that ships with the package, for the demo and for tests."""

from dllm_jepa.models.tiny._tokenizer import tiny_tokenizer

__all__ = ["tiny_tokenizer"]
