"""The modules of a step, without memory."""

from typing import Any

import torch
from torch import nn

from dllm_jepa.models import MaskedDiffusionLM

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_parts(cfg: Any) -> tuple[MaskedDiffusionLM, nn.Module | None]:
    """The online model, and the predictor if there is one, on the meta device."""
    with torch.device("meta"):
        model: MaskedDiffusionLM = cfg.model.build()
        sizes = model.sizes
        predictor = cfg.predictor.build(sizes.embed_dim, sizes.mlp_dim) if cfg.jepa_weight > 0 else None
    return model, predictor
