"""Evaluation: one scorer per task, likelihoods, and comparisons of two evaluations."""

import importlib
from typing import TYPE_CHECKING

from dllm_jepa.evals._compare import Comparison, PairedMeasure, compare
from dllm_jepa.evals._results import ResultsFolder
from dllm_jepa.evals._statistics import wilson_interval
from dllm_jepa.evals._summary import remark_lines, summarize, table
from dllm_jepa.evals._task import EvalTask, ItemResult, RunningScores, Score

if TYPE_CHECKING:
    from dllm_jepa.evals._generation_task import GenerationTask, PromptFormat, Scoring, build_generation_task
    from dllm_jepa.evals._shots import Shots
    from dllm_jepa.evals._tasks import (
        django_task,
        gsm8k_task,
        nlrx_task,
        question_answer_task,
        regex_pairs_task,
        spider_task,
    )
    from dllm_jepa.evals.heldout import HeldoutTask, heldout_task
    from dllm_jepa.evals.likelihood import conditional_log_likelihood
    from dllm_jepa.evals.mmlu import MMLUTask, mmlu_task

# What evaluates models needs torch, and comparing results does not wait for it: these are imported when first used.
_WITH_TORCH: dict[str, tuple[str, ...]] = {
    "_generation_task": ("GenerationTask", "PromptFormat", "Scoring", "build_generation_task"),
    "_shots": ("Shots",),
    "_tasks": ("django_task", "gsm8k_task", "nlrx_task", "question_answer_task", "regex_pairs_task", "spider_task"),
    "heldout": ("HeldoutTask", "heldout_task"),
    "likelihood": ("conditional_log_likelihood",),
    "mmlu": ("MMLUTask", "mmlu_task"),
}

_SCORERS = ("django", "gsm8k", "nlrx", "spider")

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
    "question_answer_task",
    "regex_pairs_task",
    "remark_lines",
    "spider_task",
    "summarize",
    "table",
    "wilson_interval",
]


def __getattr__(name: str) -> object:
    if name in _SCORERS:
        return importlib.import_module(f"{__name__}.{name}")
    for module, names in _WITH_TORCH.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
