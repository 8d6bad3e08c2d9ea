"""Spider: predicted queries, judged by what they give; running them safely; stand-ins for its databases."""

from dllm_jepa.evals.spider._execution_match import Databases, score
from dllm_jepa.evals.spider._sandbox import Limits, Result, Sandbox, execute
from dllm_jepa.evals.spider._stand_in_databases import make_stand_ins

__all__ = ["Databases", "Limits", "Result", "Sandbox", "execute", "make_stand_ins", "score"]
