"""DLLM-JEPA: fine-tuning of masked diffusion language models with a joint-embedding predictive objective."""

__version__ = "0.1.0"
