"""Trial builds: a component that is cheap to build is built once during validation, so that it can complain itself.

A builder raises ValueError for bad values. Calling it here turns that into one line of the list of problems, before a
model is loaded; what it builds is thrown away.
"""

from collections.abc import Mapping
from typing import Any

from dllm_jepa.config._components import UNSET, locate
from dllm_jepa.config._kinds import Component, Key

# A schedule is built for so many steps when the yaml does not say: longer than any warm-up.
_MANY_STEPS = 10_000_000


def trial_problems(values: Mapping[str, Any], keys: tuple[Key, ...], bad: set[str]) -> list[str]:
    """Build every component that has a trial and return what the builders say against their values.

    Args:
        values: The config, plain.
        keys: The top-level keys.
        bad: Keys that have problems already; they are not built. Keys that fail here are added.
    """
    problems = []
    for key in keys:
        if not isinstance(key.kind, Component) or key.kind.trial is None or key.name in bad:
            continue
        node = values[key.name]
        if node is None or _has_unset(node):
            continue
        if key.kind.trial == "lr_scheduler" and ("optimizer" in bad or _has_unset(values["optimizer"])):
            continue
        try:
            built = _build(key.kind.trial, node, values)
        except (ValueError, ArithmeticError, RuntimeError) as error:  # the last two: torch, for impossible sizes
            problems.append(f"{key.name}: {error}")
            bad.add(key.name)
            continue
        if key.kind.check is not None and (problem := key.kind.check(built)) is not None:
            problems.append(f"{key.name}: {node['_component_']} {problem}")
            bad.add(key.name)
    return problems


def _has_unset(node: object) -> bool:
    """Return whether a value somewhere inside is not known yet."""
    if isinstance(node, Mapping):
        return any(map(_has_unset, node.values()))
    return any(map(_has_unset, node)) if isinstance(node, list) else node is UNSET


def _build(trial: str, node: Mapping[str, Any], values: Mapping[str, Any]) -> object:
    """Build one component the way `Component.trial` says."""
    import torch  # seconds to import; `dllm-jepa ls` must not pay for it

    arguments = {name: value for name, value in node.items() if name != "_component_"}
    builder: Any = locate(node["_component_"])
    if trial == "meta":
        with torch.device("meta"):
            return builder(**arguments)
    if trial == "optimizer":
        return builder([torch.nn.Parameter(torch.zeros(1))], **arguments)
    if trial == "lr_scheduler":
        optimizer = _build("optimizer", values["optimizer"], values)
        return builder(optimizer, **{"num_training_steps": _MANY_STEPS, **arguments})
    return builder(**arguments)
