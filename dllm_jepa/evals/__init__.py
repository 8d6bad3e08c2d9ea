"""Evaluation: one scorer per task, likelihoods, and comparisons of two evaluations."""

from dllm_jepa.evals._compare import Comparison, PairedMeasure, compare
from dllm_jepa.evals._generation_task import GenerationTask, PromptFormat, Scoring, build_generation_task
from dllm_jepa.evals._results import ResultsFolder
from dllm_jepa.evals._running import RunningScores
from dllm_jepa.evals._score import ItemResult, Score
from dllm_jepa.evals._shots import Shots
from dllm_jepa.evals._statistics import wilson_interval
from dllm_jepa.evals._summary import remark_lines, summarize, table
from dllm_jepa.evals._task import EvalTask
from dllm_jepa.evals._tasks import django_task, gsm8k_task, nlrx_task, regex_pairs_task, spider_task
from dllm_jepa.evals.heldout import HeldoutTask, heldout_task
from dllm_jepa.evals.likelihood import conditional_log_likelihood
from dllm_jepa.evals.mmlu import MMLUTask, mmlu_task

__all__ = [
    "Comparison",
    "EvalTask",
    "GenerationTask",
    "HeldoutTask",
    "ItemResult",
    "MMLUTask",
    "PairedMeasure",
    "PromptFormat",
    "ResultsFolder",
    "RunningScores",
    "Score",
    "Scoring",
    "Shots",
    "build_generation_task",
    "compare",
    "conditional_log_likelihood",
    "django_task",
    "gsm8k_task",
    "heldout_task",
    "mmlu_task",
    "nlrx_task",
    "regex_pairs_task",
    "remark_lines",
    "spider_task",
    "summarize",
    "table",
    "wilson_interval",
]
