"""Evaluation: one scorer per task, likelihoods, and comparisons of two evaluations."""

from dllm_jepa.evals._score import ItemResult, Score
from dllm_jepa.evals._task import EvalTask

__all__ = ["EvalTask", "ItemResult", "Score"]
