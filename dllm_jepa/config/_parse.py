"""From a recipe's command line to a checked config, and from a `UserError` to one message."""

import functools
import importlib
import importlib.util
import inspect
import json
import os
import runpy
import sys
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from dllm_jepa.config._component import UNSET, UnsetReference
from dllm_jepa.config._config import Config, Launch, Verbatim, has_mark, key_table
from dllm_jepa.errors import ConfigError, LaunchError, LostRankError, UserError, nearest_first
from dllm_jepa.packaged import find_configs, find_recipes, resolve_config

AnyConfig = TypeVar("AnyConfig", bound=Config)

# When one rank exits, torchrun ends the others. A rank other than 0 that fails waits so long for rank 0 to fail with
# the same message; if it is still there then, rank 0 had no problem and the message is this rank's own.
_SECONDS_FOR_RANK_ZERO = 15.0


def parse(recipe_main: Callable[[AnyConfig], Any]) -> Callable[[], None]:
    """Decorate a recipe's main: it gets the checked config of the command line, and user errors become one message.

    The decorated function takes no argument and exits with code 1 after a `UserError`, be it of the config or raised by
    the recipe; other exceptions pass with their traceback. Its attribute `config_class` is the class of the config.

    Args:
        recipe_main: function of one config, whose annotation is its class.
    """
    (parameter,) = inspect.signature(recipe_main).parameters
    config_class: type[AnyConfig] = typing.get_type_hints(recipe_main)[parameter]

    @functools.wraps(recipe_main)
    def wrapper() -> None:
        words, is_rank_zero = sys.argv[1:], os.environ.get("RANK", "0") == "0"
        if {"-h", "--help"}.intersection(words):
            print(f"{inspect.getdoc(inspect.getmodule(recipe_main))}\n\nKeys, given as key=value:\n")
            print(key_table(config_class))
            return
        try:
            launch = Launch.from_environment()
            values = load_config(words, config_class)
            cfg = config_class.check(values, launch, opening=is_rank_zero)
            for line in cfg.warnings(launch) if is_rank_zero else []:
                print(f"warning: {line}", file=sys.stderr)
            recipe_main(cfg)
        except UserError as error:
            _report(error)
            sys.exit(1)

    wrapper.config_class = config_class  # type: ignore[attr-defined]
    return wrapper


def recipe_config(recipe: str) -> type[Config]:
    """The config class of a recipe.

    Args:
        recipe: name of a packaged recipe, path of a file, or name of a module.

    Raises:
        LaunchError: if there is no such recipe, or it has no `recipe_main` that `config.parse` decorates.
    """
    config_class: type[Config] | None = getattr(_names(recipe).get("recipe_main"), "config_class", None)
    if config_class is None:
        raise LaunchError(f"{recipe} is no recipe: it has no function recipe_main under @config.parse")
    return config_class


def _names(recipe: str) -> dict[str, Any]:
    """What the module of a recipe defines."""
    path = Path(recipe)
    if recipe in find_recipes():
        return vars(importlib.import_module(recipe))
    find_from_here()
    if path.suffix == ".py" and path.is_file():
        folder = str(path.resolve().parent)  # where the recipe finds its neighbours, as under `python FILE`
        sys.path[:0] = [] if folder in sys.path else [folder]
        return runpy.run_path(recipe, run_name=path.stem)
    try:
        if importlib.util.find_spec(recipe) is not None:
            return vars(importlib.import_module(recipe))
    except (ImportError, ValueError):
        pass
    names = ", ".join(nearest_first(recipe, find_recipes()))
    if recipe in find_configs():
        raise LaunchError(
            f"{recipe!r} is a config: name the recipe before it, RECIPE --config {recipe}. Recipes: {names}"
        )
    raise LaunchError(f"{recipe!r} is neither a file nor a module nor one of our recipes: {names}")


def load_config(words: Sequence[str], config_class: type[Config] = Config) -> dict[str, Any]:
    """Read the yaml of `--config` and apply the overrides.

    Args:
        words: `--config NAME|PATH` or `--config=NAME|PATH`, `key=value` and `~key`, in any order. A key may be dotted.
            A text for a key that holds a component replaces its `_component_`.
        config_class: says which keys take the text of the command line as it is; others are read as yaml.

    Returns:
        Plain values by key, not checked and without defaults; `???` where one is not known.

    Raises:
        ConfigError: if the file cannot be read or a word not understood; with every value that cannot be resolved.
    """
    name, overrides = _split(words)
    cfg = _read(resolve_config(name))
    verbatim: dict[str, str | None] = {}
    for word in overrides:
        key, separator, text = word.partition("=")
        field = config_class.model_fields.get(key)
        if separator and field is not None and has_mark(field, Verbatim):
            verbatim[key] = None if text == "null" else text
            continue
        try:
            _apply(cfg, word)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"command line: {word!r} cannot be applied: {str(error).splitlines()[0]}") from error
    values, lines = _plain(cfg, "")
    if lines:
        raise ConfigError("\n".join(["the config cannot be resolved:", *(f"  - {line}" for line in lines)]))
    find_from_here()
    return values | verbatim


def _split(words: Sequence[str]) -> tuple[str, list[str]]:
    """The value of --config, and the other words."""
    name, others = "", []
    rest = iter(words)
    for word in rest:
        if word == "--config":
            name = next(rest, "")
        elif word.startswith("--config="):
            name = word.removeprefix("--config=")
        else:
            others.append(word)
    if not name:
        raise ConfigError(
            "--config is missing: give the name of a packaged config (`dllm-jepa ls` lists them) or a yaml file"
        )
    return name, others


def _apply(cfg: DictConfig, word: str) -> None:
    """Change a config by one word of the command line."""
    if word.startswith("~"):
        *parents, last = word[1:].split(".")
        node = cfg
        for parent in parents:
            node = node[parent]
        if last not in node:
            raise ConfigError(f"command line: {word!r} removes a key that is not there")
        del node[last]
        return
    key, separator, text = word.partition("=")
    if not separator or not key or key.startswith("-"):
        raise ConfigError(f"command line: {word!r} is neither key=value nor ~key; options of torchrun come first")
    value: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
    present: Any = OmegaConf.to_container(cfg, resolve=False)  # what stands there may refer to what is still to be set
    for part in key.split("."):
        present = present.get(part) if isinstance(present, dict) else None
    if isinstance(present, dict) and "_component_" in present and isinstance(value["value"], str):
        key = f"{key}._component_"
    OmegaConf.update(cfg, key, value["value"], merge=False, force_add=True)


def _read(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid yaml: {error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path} is not a config: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} is not a mapping of keys to values")
    return loaded


def read_config(path: Path) -> dict[str, Any]:
    """The values of a yaml file as they stand there.

    Raises:
        ConfigError: if the file cannot be read or is not a yaml mapping.
    """
    values: Any = OmegaConf.to_container(_read(path), resolve=False)
    return {str(key): value for key, value in values.items()}


def _plain(node: DictConfig, prefix: str) -> tuple[dict[str, Any], list[str]]:
    """Dicts and lists of a config, `???` for what is missing, and a line for each value that cannot be resolved."""
    values: dict[str, Any] = {}
    lines: list[str] = []
    for name in map(str, node):
        dotted = prefix + name
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
            values[name] = UnsetReference(UNSET)
        except MissingMandatoryValue:
            values[name] = UNSET
        except OmegaConfBaseException as error:
            lines.append(f"{dotted}: cannot be resolved: {str(error).splitlines()[0]}")
    return values, lines


def find_from_here() -> None:
    """Make modules of the working directory importable: builders may stand in a file beside the config."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)


def _report(error: UserError) -> None:
    """Print a user error once per run: by rank 0 if it has it, else by the rank that does. A lost rank has no time."""
    message, rank = f"error: {error}", os.environ.get("RANK", "0")
    if rank != "0":
        message = f"error (rank {rank}): {error}"
        if not isinstance(error, LostRankError):
            time.sleep(_SECONDS_FOR_RANK_ZERO)
    print(message, file=sys.stderr, flush=True)
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        # torchrun ends with a report of its own, below our message; it quotes what it finds here.
        quoted = {"message": message, "timestamp": int(time.time())}
        Path(file).write_text(json.dumps(quoted), encoding="utf-8")
