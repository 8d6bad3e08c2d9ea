"""The modules of a step, without memory."""

import torch
from omegaconf import DictConfig
from torch import nn
from torchtune.config import instantiate

from dllm_jepa.models import MaskedDiffusionLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_parts(cfg: DictConfig) -> tuple[MaskedDiffusionLM, nn.Module | None]:
    """The online model, and the predictor if there is one, on the meta device."""
    with torch.device("meta"):
        model: MaskedDiffusionLM = instantiate(cfg.model)
        sizes = model.sizes
        predictor = instantiate(cfg.predictor, sizes.embed_dim, sizes.mlp_dim) if cfg.jepa_weight > 0 else None
    return model, predictor
