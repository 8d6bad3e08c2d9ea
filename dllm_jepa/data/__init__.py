"""From rows to micro-batches: tasks, the batch plan, and collation."""

from dllm_jepa.data._batch_plan import BatchPlan
from dllm_jepa.data._chat import chat
from dllm_jepa.data._collate import MicroBatch, TrainingBatches
from dllm_jepa.data._regex_pairs import generate_regex_pairs, regex_pairs
from dllm_jepa.data._sequences import SequenceDataset, build_sequences
from dllm_jepa.data._tasks import django, gsm8k, nlrx, spider
from dllm_jepa.data._text import text

__all__ = [
    "BatchPlan",
    "MicroBatch",
    "SequenceDataset",
    "TrainingBatches",
    "build_sequences",
    "chat",
    "django",
    "generate_regex_pairs",
    "gsm8k",
    "nlrx",
    "regex_pairs",
    "spider",
    "text",
]
