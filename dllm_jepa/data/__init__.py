"""From rows to micro-batches: tasks, the batch plan, and collation."""

from dllm_jepa.data._batch_plan import BatchPlan
from dllm_jepa.data._builders import join_builder
from dllm_jepa.data._chat import chat
from dllm_jepa.data._collate import MicroBatch, PrefetchedBatches, TrainingBatches, total_counts
from dllm_jepa.data._regex_pairs import generate_regex_pairs, regex_pairs
from dllm_jepa.data._sequences import SequenceDataset, build_sequences
from dllm_jepa.data._sources import Row, check_text, is_row_file, naming, read_rows
from dllm_jepa.data._tasks import TASKS, Task, django, gsm8k, nlrx, question_answer_builder, spider, spider_task
from dllm_jepa.data._templates import Template, format_prompt
from dllm_jepa.data._text import text

__all__ = [
    "TASKS",
    "BatchPlan",
    "MicroBatch",
    "PrefetchedBatches",
    "Row",
    "SequenceDataset",
    "Task",
    "Template",
    "TrainingBatches",
    "build_sequences",
    "chat",
    "check_text",
    "django",
    "format_prompt",
    "generate_regex_pairs",
    "gsm8k",
    "is_row_file",
    "join_builder",
    "naming",
    "nlrx",
    "question_answer_builder",
    "read_rows",
    "regex_pairs",
    "spider",
    "spider_task",
    "text",
    "total_counts",
]
