"""Values of a published config.json, each checked: KeyError where one is missing, ValueError where it is wrong."""

from collections.abc import Mapping
from typing import Any


def check_values(config: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]], family: str) -> None:
    """Refuse a config.json that asks for an architecture other than the family's.

    Args:
        config: content of the file.
        allowed: values, by key, that mean the family's architecture; the first is named in the message. A key that the
            file lacks is not checked.
        family: name of the family, for the message.
    """
    if num_experts := config.get("num_experts"):
        raise ValueError(
            f"num_experts is {num_experts!r}: this is a mixture of experts (such as LLaDA-MoE), and only "
            "dense models are supported"
        )
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise ValueError(f"{key} is {config[key]!r}; {family} backbones have {values[0]!r}")


def whole_number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A size, at least 1.

    Args:
        config: content of the file.
        key: its key.
        default: what the published class takes where the file has no value or null; None if it needs one (KeyError).
    """
    if default is not None and config.get(key) is None:
        return default
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {value!r}; it must be a whole number of at least 1")
    return value


def positive_number(config: Mapping[str, Any], key: str) -> float:
    """A number above 0."""
    value = config[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ValueError(f"{key} is {value!r}; it must be a number above 0")
    return value


def flag(config: Mapping[str, Any], key: str, default: bool | None = None) -> bool:
    """True or false; arguments as of `whole_number`."""
    if default is not None and config.get(key) is None:
        return default
    value = config[key]
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}; it must be true or false")
    return value


def rope_base(config: Mapping[str, Any]) -> float:
    """Base of the rotary frequencies: `rope_theta`, which transformers 5 moves into `rope_parameters`."""
    parameters = config.get("rope_parameters") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"rope_parameters is {parameters!r}; it must be an object")
    if (scaling := config.get("rope_scaling")) is not None:
        raise ValueError(f"rope_scaling is {scaling!r}; scaled positions are not supported")
    if (kind := parameters.get("rope_type", "default")) != "default":
        raise ValueError(f"rope_type in rope_parameters is {kind!r}; scaled positions are not supported")
    if "rope_theta" not in parameters:
        return positive_number(config, "rope_theta")
    base = positive_number(parameters, "rope_theta")
    if config.get("rope_theta", base) != base:
        raise ValueError(
            f"rope_theta is {config['rope_theta']!r}, and {base!r} in rope_parameters: which one is right?"
        )
    return base
