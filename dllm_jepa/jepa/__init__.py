"""The method: views, pooling, predictor, target encoder, losses and guards. Tensors in, tensors out."""

from dllm_jepa.jepa._adapter_target_encoder import EMAAdapterTargetEncoder, ema_adapter_target_encoder
from dllm_jepa.jepa._anchor import L2Anchor
from dllm_jepa.jepa._losses import (
    GlobalCounts,
    LossWeight,
    band_sums,
    jepa_loss,
    masked_token_weights,
)
from dllm_jepa.jepa._monitor import MONITOR_ROWS, CollapseMonitor, cosine_diversity, effective_rank
from dllm_jepa.jepa._pooling import pool
from dllm_jepa.jepa._predictor import Predictor, identity_predictor, mlp_predictor, transformer_predictor
from dllm_jepa.jepa._schedule import is_jepa_step, shuffled_partners
from dllm_jepa.jepa._target_encoder import EMATargetEncoder, ema_target_encoder
from dllm_jepa.jepa._views import View, Views, ViewSampler, fixed_ratio_views, uniform_ratio_views

__all__ = [
    "MONITOR_ROWS",
    "CollapseMonitor",
    "EMAAdapterTargetEncoder",
    "EMATargetEncoder",
    "GlobalCounts",
    "L2Anchor",
    "LossWeight",
    "Predictor",
    "View",
    "ViewSampler",
    "Views",
    "band_sums",
    "cosine_diversity",
    "effective_rank",
    "ema_adapter_target_encoder",
    "ema_target_encoder",
    "fixed_ratio_views",
    "identity_predictor",
    "is_jepa_step",
    "jepa_loss",
    "masked_token_weights",
    "mlp_predictor",
    "pool",
    "shuffled_partners",
    "transformer_predictor",
    "uniform_ratio_views",
]
