"""The built-in generator of (description, regex) pairs."""

from dllm_jepa.data._regex_pairs._pairs import MAX_PAIRS, WORDINGS, WORDS, generate_regex_pairs, regex_pairs

__all__ = ["MAX_PAIRS", "WORDINGS", "WORDS", "generate_regex_pairs", "regex_pairs"]
