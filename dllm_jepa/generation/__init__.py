"""Samplers: from prompts to generated tokens."""

from dllm_jepa.generation._block_sampler import BlockDecoding, DenoisingModel, Generation

__all__ = ["BlockDecoding", "DenoisingModel", "Generation"]
