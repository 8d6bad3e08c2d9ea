"""What a resumed run may change in its config, and what would make it another run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from dllm_jepa.config._bases import Training
from dllm_jepa.config._component import Component, Given
from dllm_jepa.config._config import MayChange, has_mark, marks, section_of
from dllm_jepa.config._parse import read_config
from dllm_jepa.errors import ConfigError, shown

_ABSENT = "nothing"
_ABOUT_RESUMING = ("resume", "resume_override")


def check_resume(cfg: Training, saved: Path) -> list[str]:
    """Compare a config with that of the checkpoint it goes on from.

    Args:
        cfg: the config of the resumed run; its `resume_override` lets it change the run.
        saved: `config.yaml` of the checkpoint. A key that it does not have counts with its default.

    Returns:
        A line for every key that changed and may.

    Raises:
        ConfigError: with every key that changed and makes it another run.
    """
    before, after = _with_defaults(type(cfg), read_config(saved)), cfg.model_dump(mode="json")
    allowed: list[str] = []
    changing: list[str] = []
    for key in [*after, *(name for name in before if name not in after)]:
        if key in _ABOUT_RESUMING:
            continue
        for name, old, new in _changes(key, before.get(key, _ABSENT), after.get(key, _ABSENT)):
            line = f"{name}: {shown(old)} -> {shown(new)}"
            (allowed if _may_change(type(cfg), name, before, after) else changing).append(line)
    if changing and not cfg.resume_override:
        raise ConfigError(
            f"{saved.parent} is of a run with other keys, which decide what the steps compute:\n"
            + "\n".join(f"  - {line}" for line in changing)
            + "\nSet them back, start a new run, or go on all the same with resume_override=true"
        )
    return allowed + [f"{line} (resume_override)" for line in changing]


def _with_defaults(cls: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    filled = dict(values)
    for name, field in cls.model_fields.items():
        if inner := section_of(cls, name):
            filled[name] = _with_defaults(inner, values.get(name) or {})
        elif name not in values and not field.is_required():
            default = field.get_default(call_default_factory=True)
            filled[name] = default.as_mapping() if isinstance(default, Component) else to_jsonable_python(default)
    return filled


def _changes(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of everything inside that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for part in [*old, *(part for part in new if part not in old)]:
            yield from _changes(f"{name}.{part}", old.get(part, _ABSENT), new.get(part, _ABSENT))
    elif old != new:
        yield name, old, new


def _may_change(cls: type[Training], name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    key, _, argument = name.partition(".")
    if key in ("epochs", "max_steps"):  # they say when to stop, and a schedule may stretch to it
        return _has_fixed_schedule(before) and _has_fixed_schedule(after)
    field = cls.model_fields.get(key)
    if field is None:
        return False
    return has_mark(field, MayChange) or any(argument in given.paths for given in marks(field, Given))


def _has_fixed_schedule(values: Mapping[str, Any]) -> bool:
    schedule = values["lr_scheduler"]
    return schedule is None or schedule.get("num_training_steps") is not None
