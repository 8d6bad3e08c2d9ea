"""The base class of all configs: typed keys, checked in one pass, with every problem in words."""

import ast
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from omegaconf import OmegaConf
from pydantic import (
    BaseModel,
    ConfigDict,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.fields import FieldInfo

from dllm_jepa.config._component import COMPONENT_PROBLEMS, UNSET, UnsetReference
from dllm_jepa.config._describe import COMPONENT, Phrase, describe
from dllm_jepa.errors import ConfigError, shown, suggestion
from dllm_jepa.packaged import find_recipes

Rule = Callable[..., Iterable[str]]
"""A check across keys. Its parameters are named like the keys that it reads, and it is called when all of these are
given and valid by themselves; a parameter `launch` is the `Launch`. It returns problem lines: key, value given, what is
allowed, what to do."""


@dataclass(frozen=True)
class Launch:
    """The processes and GPUs of this run, as torchrun and torch tell them.

    Args:
        world_size: processes of the run.
        local_world_size: processes on this machine.
        num_gpus: CUDA GPUs that torch sees on this machine.
    """

    world_size: int = 1
    local_world_size: int = 1
    num_gpus: int = 0

    @classmethod
    def from_environment(cls) -> "Launch":
        """Read torchrun's variables and count the GPUs."""
        import torch  # seconds to import; `dllm-jepa ls` must not pay for it

        return cls(
            world_size=int(os.environ.get("WORLD_SIZE", "1")),
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            num_gpus=torch.cuda.device_count() if torch.cuda.is_available() else 0,
        )


class MayChange:
    """In an annotation: a resumed run may have another value, since the key does not decide what its steps compute."""


class Verbatim:
    """In an annotation: on the command line the value is taken as it is, but for `null`; other keys are read as yaml.

    What people write freely has colons, hashes and equals signs.
    """


Text = Annotated[str, StringConstraints(pattern=r"\S")]
PathText = Annotated[Text, Phrase("a path")]
Dtype = Literal["fp32", "bf16"]

# What other frameworks call these keys, or where people look for them.
_ELSEWHERE = {
    "optimizer.lr": "lr learning_rate",
    "optimizer.weight_decay": "weight_decay",
    "optimizer._component_": "optim optimizer_type",
    "lr_scheduler.warmup_ratio or lr_scheduler.num_warmup_steps": "warmup_ratio warmup_steps num_warmup_steps warmup",
    "lr_scheduler": "scheduler lr_scheduler_type",
    "global_batch_size (sequences per step, over all ranks) and tokens_per_device (tokens per micro-batch)": (
        "batch_size per_device_train_batch_size train_batch_size micro_batch_size gradient_accumulation_steps"
    ),
    "compute_dtype": "bf16 fp16 precision mixed_precision",
    "clip_grad_norm": "max_grad_norm grad_clip gradient_clip_val",
    "epochs": "num_train_epochs num_epochs",
    "max_steps": "max_steps_per_epoch num_steps total_steps",
    "max_seq_len": "max_length max_seq_length cutoff_len",
    "checkpoint.every_n_steps": "save_steps save_every save_every_n_steps save_interval",
    "checkpoint.keep_last": "save_total_limit",
    "log_every_n_steps": "logging_steps log_interval",
    "metric_logger": "report_to logger wandb",
    "enable_activation_checkpointing": "gradient_checkpointing activation_checkpointing",
    "resume": "resume_from_checkpoint resume_from",
    "checkpoint_dir": "model_name_or_path model_path pretrained_model_name_or_path",
    "model.lora_rank": "lora_rank lora_r r",
    "model.lora_alpha": "lora_alpha",
    "target_encoder.ema_decay": "ema_decay tau momentum",
    "view_sampler.context_ratio": "context_ratio mask_ratio",
    "view_sampler.target_ratio": "target_ratio",
    "predictor.num_layers": "num_layers predictor_layers",
    "decoding.temperature": "temperature",
    "decoding.gen_length": "max_new_tokens max_tokens max_gen_toks",
    "max_items": "limit num_samples",
    "no key: evaluate with the recipe dllm_jepa_eval": "eval_steps eval_strategy evaluation_strategy",
}

_OF_ANOTHER = re.compile(r"(\w+): a key of (\w+(?: and \w+)*)")
_MEANT = {word: key for key, words in _ELSEWHERE.items() for word in words.split()}


class Section(BaseModel):
    """A group of keys inside a config."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class Config(Section):
    """The keys of a recipe. A recipe declares a subclass in its own file and gets a checked instance of it.

    A key is a field with a type, and if it has one a default:

        smoothing: Annotated[float, Field(ge=0, lt=1, description="label smoothing")] = 0.1

    Keys stand in the yaml, on the command line (`smoothing=0.3`), in messages and in the saved config.yaml.
    """

    rules: ClassVar[tuple[Rule, ...]] = ()
    """Rules across keys; what they return stops a run."""

    opens: ClassVar[tuple[Rule, ...]] = ()
    """Rules that open files; called last, and only for a config without other problems."""

    remarks: ClassVar[tuple[Rule, ...]] = ()
    """Rules whose lines are shown as warnings."""

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a rule that no config could ever call."""
        for rule in (*cls.rules, *cls.opens, *cls.remarks):
            if unknown := inspect.signature(rule).parameters.keys() - {*cls.model_fields, "launch"}:
                raise TypeError(f"{cls.__qualname__}: rule {rule.__name__} reads {unknown.pop()!r}, which is no key")

    @field_validator("*")
    @classmethod
    def _collect(cls, value: Any, info: ValidationInfo) -> Any:
        """Keep every valid value, for the rules to read although other keys are not valid."""
        if info.context is not None:
            info.context[info.field_name] = value
        return value

    @classmethod
    def check(cls, values: Mapping[str, Any], launch: Launch | None = None, *, opening: bool = False) -> Self:
        """A config of these values.

        Args:
            values: plain values by key, as yaml has them; `???` where one is not known.
            launch: processes and GPUs to check the config against; None leaves these rules out.
            opening: also open the files and folders that it names.

        Raises:
            ConfigError: with every problem, one per line.
        """
        result, lines = cls._checked(values, launch, opening)
        if result is None or lines:
            count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
            raise ConfigError(f"the config has {count}:\n" + "\n".join(f"  - {line}" for line in lines))
        return result

    @classmethod
    def problems(cls, values: Mapping[str, Any], launch: Launch | None = None, *, opening: bool = False) -> list[str]:
        """Every problem of a config, one line each; arguments as of `check`."""
        return cls._checked(values, launch, opening)[1]

    def warnings(self, launch: Launch | None = None) -> list[str]:
        """What a valid config should be warned about, one line each."""
        return [*_call(self.remarks, {name: getattr(self, name) for name in type(self).model_fields}, launch)]

    def to_yaml(self) -> str:
        """The config as yaml: given to a recipe again, it makes the same run."""
        # OmegaConf reads it again, and takes more texts for numbers than plain yaml: its own writer quotes them.
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json")))

    @classmethod
    def _checked(cls, values: Mapping[str, Any], launch: Launch | None, opening: bool) -> tuple[Self | None, list[str]]:
        unset = dict(_unset(values))
        to_set = (key for key, value in unset.items() if not isinstance(value, UnsetReference))
        lines = [f"{key}: ??? must be set; write it into the yaml or give {key}=VALUE" for key in to_set]
        broken = [name for name, value in values.items() if not _is_unicode(value)]
        lines += [f"{name} holds half of a surrogate pair, which is no character; give it in UTF-8" for name in broken]
        known = {name: value for name, value in values.items() if value != UNSET and name not in broken}
        left_out = {n: field for n, field in cls.model_fields.items() if n not in values and not field.is_required()}
        valid = {name: field.get_default(call_default_factory=True) for name, field in left_out.items()}
        result = None
        try:
            result = cls.model_validate_json(json.dumps(known, default=str), context=valid)
        except ValidationError as error:
            lines += _together(_lines(cls, error, {**values, **dict.fromkeys(broken, UNSET)}))
        for key in unset:
            valid.pop(key.partition(".")[0], None)
        lines += _call(cls.rules, valid, launch)
        if opening and not lines:
            lines += _call(cls.opens, valid, launch)
        return result, lines


def _is_unicode(value: Any) -> bool:
    """Whether all text inside is; a byte of the command line that is not UTF-8 becomes half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True


def _call(rules: Iterable[Rule], valid: Mapping[str, Any], launch: Launch | None) -> Iterator[str]:
    """The lines of every rule whose keys are all there."""
    known = dict(valid) if launch is None else {**valid, "launch": launch}
    for rule in rules:
        names = inspect.signature(rule).parameters.keys()
        if names <= known.keys():
            yield from rule(**{name: known[name] for name in names})


def _unset(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Keys and values of all that is `???`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _unset(value, f"{prefix}{name}.")
        elif value == UNSET:
            yield f"{prefix}{name}", value


def _lines(cls: type[Config], error: ValidationError, values: Mapping[str, Any]) -> Iterator[str]:
    """What pydantic found, a line for every key; none for those that are `???`."""
    seen = set()
    all_keys_said = False
    for found in error.errors(include_url=False):
        if not found["loc"]:  # a validator of the class's own, on all keys together
            yield found["msg"]
            continue
        owner, names = _owner(cls, found["loc"])
        key = ".".join(names)
        if key in seen or UNSET in (values.get(names[0]), _value(values, names, None)):
            continue
        seen.add(key)
        if found["type"] == COMPONENT_PROBLEMS:
            yield from (f"{key}{line}".replace("~KEY", f"~{key}") for line in found["ctx"]["lines"])
        elif found["type"] == "extra_forbidden":
            line = _unknown_key(owner, names, found["input"])
            if line.endswith(").") and not all_keys_said:  # no hint
                line, all_keys_said = f"{line} The keys are: {', '.join(owner.model_fields)}", True
            yield line
        elif found["type"] in ("value_error", "assertion_error"):  # a validator of the class's own
            yield f"{key}: {shown(found['input'])} given: {found['msg']}"
        elif found["type"] == "missing" and len(found["loc"]) == len(names):
            yield f"{key}: missing{_meaning(owner, names[-1])}; give {_allowed(owner, names[-1])}"
        else:  # of a list, what is found may be about an entry: the whole value is shown
            yield _wrong_value(owner, names, _value(values, names, found["input"]))


def _together(lines: Iterable[str]) -> Iterator[str]:
    """The same lines, with one for all keys that belong to the same other recipes: a config of another recipe."""
    strangers: dict[str, list[str]] = {}
    for line in lines:
        if found := _OF_ANOTHER.fullmatch(line):
            strangers.setdefault(found[2], []).append(found[1])
        else:
            yield line
    for recipes, keys in strangers.items():
        noun = "a key" if len(keys) == 1 else "keys"
        yield f"{', '.join(keys)}: {noun} of {recipes}, not of this recipe; remove what is not meant, or start that one"


def _owner(cls: type[BaseModel], location: tuple[int | str, ...]) -> tuple[type[BaseModel], list[str]]:
    """The class that has a key, and the key's name after those of the sections around it."""
    names = [str(location[0])]
    for name in map(str, location[1:]):
        inner = section_of(cls, names[-1])
        if inner is None:  # what is inside a component or a list
            break
        cls, names = inner, [*names, name]
    return cls, names


def section_of(cls: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The class of the section that a key stands for; None for another key."""
    field = cls.model_fields.get(name)
    inner = None if field is None else field.annotation
    return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None


def _value(values: Any, names: list[str], default: object) -> Any:
    """The value of a key; `default` if it is not in the yaml."""
    for name in names:
        if name not in values:
            return default
        values = values[name]
    return values


def _unknown_key(owner: type[BaseModel], names: list[str], value: object) -> str:
    key, name = ".".join(names), names[-1]
    unknown = f"{key}: unknown key (value {shown(value)})"
    if len(names) > 1:
        return f"{unknown}.{suggestion(name, owner.model_fields)}"
    meant = _MEANT.get(name, "")
    if meant.partition(".")[0].partition(" ")[0] in owner.model_fields:
        return f"{unknown}; here it is {meant}"
    if recipes := _recipes_with(name):
        return f"{key}: a key of {' and '.join(recipes)}"
    if meant.startswith("no key"):
        return f"{unknown}; there is {meant}"
    return f"{unknown}.{suggestion(name, owner.model_fields)}"


def _recipes_with(name: str) -> list[str]:
    """The packaged recipes whose config class has a key, read from their text: importing one takes seconds."""
    shared = {base.__name__: base.model_fields for base in Config.__subclasses__()}
    found = []
    for recipe, path in find_recipes().items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == "Config":
                own = [line.target for line in node.body if isinstance(line, ast.AnnAssign)]
                keys = {target.id for target in own if isinstance(target, ast.Name)}
                keys.update(*(shared.get(ast.unparse(base).rpartition(".")[2], {}) for base in node.bases))
                found += [recipe] if name in keys else []
    return found


def _wrong_value(owner: type[BaseModel], names: list[str], value: object) -> str:
    key, name = ".".join(names), names[-1]
    allowed = _allowed(owner, name)
    if value in ("fp16", "float16", "half") and "bf16" in allowed:
        return (
            f"{key}: {value} is not offered: fp16 overflows without loss scaling, which these recipes do not do; bf16 "
            "takes the same memory and has the range of fp32, so take bf16 or fp32"
        )
    return f"{key}: {shown(value)} given, must be {allowed}{_meaning(owner, name)}"


def _allowed(owner: type[BaseModel], name: str) -> str:
    field = owner.model_fields[name]
    return describe(field.annotation, field.metadata)


def _meaning(owner: type[BaseModel], name: str) -> str:
    description = owner.model_fields[name].description
    return f" ({description})" if description else ""


def _metadata(field: FieldInfo) -> Iterator[Any]:
    """Everything that the annotation of a field says besides its type, also inside `X | None`."""
    yield from field.metadata
    pending = [field.annotation]
    while pending:
        annotation = pending.pop()
        yield from getattr(annotation, "__metadata__", ())
        pending += [part for part in getattr(annotation, "__args__", ()) if not isinstance(part, str)]


def marks(field: FieldInfo, kind: type) -> list[Any]:
    """The entries of a kind in the annotation of a field: the class itself, such as `MayChange`, or instances of it."""
    return [entry for entry in _metadata(field) if entry is kind or isinstance(entry, kind)]


def has_mark(field: FieldInfo, kind: type) -> bool:
    """Whether the annotation of a field has such an entry."""
    return bool(marks(field, kind))


def key_table(cls: type[Config]) -> str:
    """The keys of a config class as a Markdown table."""
    return "\n".join(["| key | value | default | effect |", "|---|---|---|---|", *_rows(cls, "")])


def _rows(cls: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in cls.model_fields.items():
        if inner := section_of(cls, name):
            yield from _rows(inner, f"{prefix}{name}.")
            continue
        default = "must be given" if field.is_required() else f"`{shown(field.get_default(call_default_factory=True))}`"
        allowed = _allowed(cls, name).replace(COMPONENT, "a component")
        yield f"| `{prefix}{name}` | {allowed} | {default} | {field.description or ''} |"
