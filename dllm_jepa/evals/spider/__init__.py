"""Spider: predicted queries, judged by what they give; running them safely."""

from dllm_jepa.evals.spider._execution_match import DOWNLOAD, Databases, score
from dllm_jepa.evals.spider._sandbox import Limits, Result, Sandbox, execute
from dllm_jepa.evals.spider._sql_text import from_code_fence

__all__ = ["DOWNLOAD", "Databases", "Limits", "Result", "Sandbox", "execute", "from_code_fence", "score"]
