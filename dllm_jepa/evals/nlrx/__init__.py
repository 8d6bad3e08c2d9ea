"""NL-RX: predicted regexes, judged by the language that they denote."""

from dllm_jepa.evals.nlrx._regex_syntax import Dialect
from dllm_jepa.evals.nlrx._scoring import best_constant, equivalent, gold_regex, is_empty, score

__all__ = ["Dialect", "best_constant", "equivalent", "gold_regex", "is_empty", "score"]
