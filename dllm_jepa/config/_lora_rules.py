"""Rules of models with adapters: which recipe trains them, and what they exclude."""

import inspect
from collections.abc import Mapping
from typing import Any

from dllm_jepa.config._components import locate
from dllm_jepa.config._rules import Launch

_WHOLE_MODEL_AVERAGE = "dllm_jepa.jepa.ema_target_encoder"
_ADAPTER_AVERAGE = "dllm_jepa.jepa.ema_adapter_target_encoder"


def all_weights_trained(model: Any) -> str | None:
    """Say that a model has frozen weights, which full fine-tuning cannot train."""
    if all(_trained(model)):
        return None
    return (
        "builds a frozen (or quantized) base with adapters, and dllm_jepa_full trains all weights; take a builder "
        "without lora, or the recipe dllm_jepa_lora"
    )


def adapters_on_a_frozen_base(model: Any) -> str | None:
    """Say that a model has no adapters to be trained."""
    trained = _trained(model)
    if any(trained) and not all(trained):
        return None
    return "builds no adapters; take a builder such as lora_llada_8b, or the recipe dllm_jepa_full"


def whole_backbone_is_averaged(target_encoder: Mapping[str, Any] | None) -> list[str]:
    """Full fine-tuning has no adapters to average."""
    return _other_average(target_encoder, _ADAPTER_AVERAGE, _WHOLE_MODEL_AVERAGE, "all weights are trained")


def adapters_are_averaged(target_encoder: Mapping[str, Any] | None) -> list[str]:
    """Under LoRA the base is shared, and only the adapters have an average."""
    return _other_average(target_encoder, _WHOLE_MODEL_AVERAGE, _ADAPTER_AVERAGE, "only adapters are trained")


def merged_with_an_export(export_merged: bool, export: str | None) -> list[str]:
    """What is merged is what is exported."""
    if not export_merged or export is not None:
        return []
    return ["export_merged: true, but export is null, so there is nothing to merge; set export: online, target or both"]


def dora_magnitudes_in_fp32(model: Mapping[str, Any], compute_dtype: str, launch: Launch) -> list[str]:
    """FSDP gathers every parameter in the compute type, and small steps of magnitudes are lost in bf16."""
    if launch.world_size == 1 or compute_dtype == "fp32" or not _argument(model, "use_dora"):
        return []
    return [
        f"model.use_dora: true with compute_dtype: {compute_dtype} on {launch.world_size} processes, where magnitudes "
        "would be used in bf16, which loses their small steps; set use_dora: false or compute_dtype: fp32, or start "
        "one process"
    ]


def quantized_dora_in_one_process(model: Mapping[str, Any], launch: Launch) -> list[str]:
    """DoRA needs the whole weight in every forward, which FSDP2 does not give of a quantized one."""
    if launch.world_size == 1 or not (_argument(model, "use_dora") and _argument(model, "quantize_base")):
        return []
    return [
        f"model.use_dora: true with quantize_base: true on {launch.world_size} processes, which FSDP2 cannot shard; "
        "set use_dora: false or quantize_base: false, or start one process"
    ]


def _trained(model: Any) -> list[bool]:
    return [param.requires_grad for param in model.parameters()] if hasattr(model, "parameters") else []


def _argument(component: Mapping[str, Any], name: str) -> Any:
    """The value of a builder's argument: that of the yaml, or the builder's default; None if it has no such argument.

    A builder that cannot be found is a problem of its own.
    """
    if name in component:
        return component[name]
    parameter = inspect.signature(locate(component["_component_"])).parameters.get(name)  # type: ignore[arg-type]
    return None if parameter is None or parameter.default is parameter.empty else parameter.default


def _other_average(target_encoder: Mapping[str, Any] | None, wrong: str, right: str, reason: str) -> list[str]:
    if target_encoder is None or target_encoder["_component_"] != wrong:
        return []
    return [f"target_encoder._component_: {wrong}, but {reason}; take {right}"]
