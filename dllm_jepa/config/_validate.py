"""Check a config against its schema and list every problem at once, before anything is loaded or written."""

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from dllm_jepa.config._components import UNSET, component_problems
from dllm_jepa.config._kinds import REQUIRED, Choice, Component, Key, Section
from dllm_jepa.config._rules import Launch
from dllm_jepa.config._schema import SCHEMAS, TRAINING, Rule, Schema
from dllm_jepa.config._trial import trial_problems
from dllm_jepa.config._wording import shown, suggestion
from dllm_jepa.errors import ConfigError


def with_defaults(cfg: DictConfig, schema: Schema = TRAINING) -> DictConfig:
    """Return the config with absent keys filled in and all keys in the schema's order; unknown keys come last."""
    given = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(given, dict), f"a config is a mapping, not {type(given).__name__}"
    return OmegaConf.create(_filled({str(name): value for name, value in given.items()}, schema.keys))


def _filled(given: dict[str, Any], keys: tuple[Key, ...]) -> dict[str, Any]:
    filled: dict[str, Any] = {}
    for key in keys:
        if key.name in given:
            filled[key.name] = given[key.name]
        elif key.default is not REQUIRED:
            filled[key.name] = key.default
        if isinstance(key.kind, Component) and isinstance(filled.get(key.name), str):
            filled[key.name] = {"_component_": filled[key.name]}  # key=package.builder where the yaml has null
        if isinstance(key.kind, Section) and isinstance(filled.get(key.name), dict):
            filled[key.name] = _filled(filled[key.name], key.kind.keys)
    return filled | {name: value for name, value in given.items() if name not in filled}


def validate(cfg: DictConfig, schema: Schema = TRAINING, launch: Launch | None = None) -> None:
    """Raise if the config cannot be run.

    Args:
        cfg: The config.
        schema: The keys and rules of the recipe.
        launch: Processes and GPUs to check the config against; None checks it for no machine in particular.

    Raises:
        ConfigError: With every problem, one per line.
    """
    lines = problems(cfg, schema, launch)
    if lines:
        count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise ConfigError(f"the config has {count}:\n" + "\n".join(f"  - {line}" for line in lines))


def problems(cfg: DictConfig, schema: Schema = TRAINING, launch: Launch | None = None) -> list[str]:
    """Return every problem of a config, one line each: key, value given, what is allowed, what to do.

    Args:
        cfg: The config; absent keys count with their defaults.
        schema: The keys and rules of the recipe.
        launch: Processes and GPUs to check the config against; None leaves these rules out.
    """
    values, lines = _plain(with_defaults(cfg, schema), "")
    bad: set[str] = set()
    lines += _key_problems(values, schema.keys, "", bad)
    _let_components_import_from_here()
    for key in schema.keys:
        if isinstance(key.kind, Component) and key.name not in bad and values[key.name] is not None:
            found = component_problems(key.name, values[key.name], key.kind)
            lines += found
            bad |= {key.name} if found else set()
    lines += trial_problems(values, schema.keys, bad)
    lines += _rule_problems(schema.rules, values, bad)
    if launch is not None:
        lines += _rule_problems(schema.launch_rules, values | {"launch": launch}, bad)
    return lines


def warnings(cfg: DictConfig, schema: Schema = TRAINING) -> list[str]:
    """Return what a valid config should be warned about, one line each."""
    values, _ = _plain(with_defaults(cfg, schema), "")
    return _rule_problems(schema.warnings, values, set())


def _let_components_import_from_here() -> None:
    """Make modules of the working directory importable, as torchtune does before it builds a component."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def _plain(node: DictConfig, prefix: str) -> tuple[dict[str, Any], list[str]]:
    """Turn a config into dicts and lists; return them with a line for each value that is missing or cannot be resolved.

    Such a value becomes `UNSET`.
    """
    values: dict[str, Any] = {}
    lines: list[str] = []
    for name in map(str, node):
        dotted = prefix + name
        values[name] = UNSET
        try:
            value = node[name]
            if isinstance(value, DictConfig):
                values[name], found = _plain(value, f"{dotted}.")
                lines += found
            elif isinstance(value, ListConfig):
                values[name] = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
            else:
                values[name] = value
        except InterpolationToMissingValueError:
            continue  # the key that it refers to is listed itself
        except MissingMandatoryValue:
            lines.append(f"{dotted}: ??? must be set; write it into the yaml or give {dotted}=VALUE")
        except OmegaConfBaseException as error:
            lines.append(f"{dotted}: cannot be resolved: {str(error).splitlines()[0]}")
    return values, lines


def _key_problems(values: dict[str, Any], keys: tuple[Key, ...], prefix: str, bad: set[str]) -> list[str]:
    """Return unknown, absent and wrong values; add the top-level keys that rules must not read to `bad`."""
    lines = []
    names = [key.name for key in keys]
    for name in values:
        if name not in names:
            lines.append(_unknown_key(name, prefix, values[name], names))
    for key in keys:
        dotted = prefix + key.name
        if key.name not in values:
            lines.append(f"{dotted}: missing ({key.doc}); give {key.describe()}")
        elif values[key.name] is UNSET:
            pass
        elif not key.allows(values[key.name]):
            lines.append(_wrong_value(dotted, key, values[key.name]))
        else:
            if isinstance(key.kind, Section):
                lines += _key_problems(values[key.name], key.kind.keys, f"{dotted}.", bad)
            continue
        bad.add(dotted.split(".")[0])
    return lines


def _unknown_key(name: str, prefix: str, value: object, names: list[str]) -> str:
    others = [] if prefix else [recipe for recipe, schema in SCHEMAS.items() if name in {k.name for k in schema.keys}]
    if others:
        return f"{name}: a key of the recipe {', '.join(others)}, not of this one; remove it, or start that recipe"
    hint = suggestion(name, names) or f" The keys are: {', '.join(names)}"
    return f"{prefix}{name}: unknown key (value {shown(value)}).{hint}"


def _wrong_value(dotted: str, key: Key, value: object) -> str:
    refused = key.kind.refused if isinstance(key.kind, Choice) else {}
    if isinstance(value, str) and value in refused:
        return f"{dotted}: {value} is not offered: {refused[value]}"
    return f"{dotted}: {shown(value)} given, must be {key.describe()} ({key.doc})"


def _rule_problems(rules: tuple[Rule, ...], values: Mapping[str, Any], bad: set[str]) -> list[str]:
    """Call every rule whose keys are all valid by themselves."""
    lines = []
    for rule in rules:
        names = list(inspect.signature(rule).parameters)
        if not bad.intersection(names) and not any(values[name] is UNSET for name in names):
            lines += rule(**{name: values[name] for name in names})
    return lines
