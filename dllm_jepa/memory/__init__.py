"""The memory that a training step needs on every GPU, computed from a config without a GPU and without weights."""

from dllm_jepa.memory._simulation import LiveStorages
from dllm_jepa.memory._step import MemoryTable, step_memory

__all__ = ["LiveStorages", "MemoryTable", "step_memory"]
