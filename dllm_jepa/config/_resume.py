"""What a resumed run may change in its config, and what would make it another run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dllm_jepa.config._kinds import Component, Key
from dllm_jepa.config._parse import read_config
from dllm_jepa.config._schema import TRAINING, Schema
from dllm_jepa.config._validate import with_defaults
from dllm_jepa.config._wording import shown
from dllm_jepa.errors import ConfigError

_ABSENT = "nothing"
_ABOUT_RESUMING = ("resume", "resume_override")


def check_resume(cfg: DictConfig, saved: Path, schema: Schema = TRAINING) -> list[str]:
    """Compare a config with that of the checkpoint it goes on from.

    Args:
        cfg: The config of the resumed run, checked; its `resume_override` lets it change the run.
        saved: `config.yaml` of the checkpoint.
        schema: The keys, which say what may change.

    Returns:
        A line for every key that changed and may.

    Raises:
        ConfigError: With every key that changed and makes it another run.
    """
    before, after = _plain(with_defaults(read_config(saved), schema)), _plain(with_defaults(cfg, schema))
    harmless: list[str] = []
    changing: list[str] = []
    for key in (key for key in schema.keys if key.name not in _ABOUT_RESUMING):
        for name, old, new in _changes(key.name, before.get(key.name, _ABSENT), after.get(key.name, _ABSENT)):
            line = f"{name}: {shown(old)} -> {shown(new)}"
            (harmless if _may_change(key, name, before, after) else changing).append(line)
    if changing and not cfg.resume_override:
        raise ConfigError(
            f"{saved.parent} is of a run with other keys, which decide what the steps compute:\n"
            + "\n".join(f"  - {line}" for line in changing)
            + "\nSet them back, start a new run, or go on all the same with resume_override=true"
        )
    return harmless + [f"{line} (resume_override)" for line in changing]


def _plain(cfg: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict), type(values)
    return {str(name): value for name, value in values.items()}


def _changes(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of everything inside that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for part in [*old, *(part for part in new if part not in old)]:
            yield from _changes(f"{name}.{part}", old.get(part, _ABSENT), new.get(part, _ABSENT))
    elif old != new:
        yield name, old, new


def _may_change(key: Key, name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    if key.name in ("epochs", "max_steps"):  # they say when to stop, and a schedule may stretch to it
        return _has_fixed_schedule(before) and _has_fixed_schedule(after)
    paths = key.kind.paths if isinstance(key.kind, Component) else ()
    return key.may_change or name in {f"{key.name}.{argument}" for argument in paths}


def _has_fixed_schedule(values: Mapping[str, Any]) -> bool:
    schedule = values["lr_scheduler"]
    return schedule is None or schedule.get("num_training_steps") is not None
