"""From a recipe's command line to a checked config, and from a `UserError` to one message."""

import functools
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dllm_jepa.config._resolve import resolve_config
from dllm_jepa.config._rules import Launch
from dllm_jepa.config._schema import TRAINING, Schema
from dllm_jepa.config._validate import validate, warnings, with_defaults
from dllm_jepa.errors import ConfigError, LostRankError, UserError

RecipeMain = Callable[[DictConfig], Any]

_NO_CONFIG = "--config is missing: give the name of a packaged config (`dllm-jepa ls` lists them) or a yaml file"

# When one rank exits, torchrun ends the others. A rank other than 0 that fails waits so long for rank 0 to fail with
# the same message; if it is still there then, rank 0 had no problem and the message is this rank's own.
_SECONDS_FOR_RANK_ZERO = 15.0


@overload
def parse(recipe_main: RecipeMain, /) -> Callable[[], None]: ...


@overload
def parse(*, schema: Schema) -> Callable[[RecipeMain], Callable[[], None]]: ...


def parse(
    recipe_main: RecipeMain | None = None, /, *, schema: Schema = TRAINING
) -> Callable[[], None] | Callable[[RecipeMain], Callable[[], None]]:
    """Decorate a recipe's main: it gets the checked config of the command line, and user errors become one message.

    The decorated function takes no argument and exits with code 1 after a `UserError`, be it of the config or raised by
    the recipe; other exceptions pass with their traceback. Use as `@parse` or `@parse(schema=...)`.

    Args:
        recipe_main: Function of the config: all keys of the schema, defaults filled in, everything checked.
        schema: The keys and rules of the recipe.
    """
    if recipe_main is None:
        return functools.partial(_parsed, schema=schema)
    return _parsed(recipe_main, schema=schema)


def _parsed(recipe_main: RecipeMain, *, schema: Schema) -> Callable[[], None]:
    @functools.wraps(recipe_main)
    def wrapper() -> None:
        try:
            cfg = with_defaults(load_config(sys.argv[1:], verbatim=schema.verbatim), schema)
            validate(cfg, schema, Launch.from_environment())
            if _rank() == 0:
                for line in warnings(cfg, schema):
                    print(f"warning: {line}", file=sys.stderr)
            recipe_main(cfg)
        except UserError as error:
            _report(error)
            sys.exit(1)

    return wrapper


def load_config(arguments: Sequence[str], *, verbatim: Collection[str] = ()) -> DictConfig:
    """Read the yaml of `--config` and merge the overrides, by torchtune's rules.

    Args:
        arguments: `--config NAME|PATH` or `--config=NAME|PATH`, `key=value` and `~key`, in any order.
        verbatim: keys whose values on the command line are taken as they are, but for `null`; others are yaml.

    Returns:
        The merged config, not checked and without defaults.

    Raises:
        ConfigError: If the file cannot be read or an argument not understood.
    """
    from torchtune import config as torchtune_config  # seconds to import; `dllm-jepa ls` must not pay for it

    texts = {key: text for key, _, text in (word.partition("=") for word in arguments) if key in verbatim}
    resolved = _with_resolved_config([word for word in arguments if word.partition("=")[0] not in verbatim])
    merged: list[DictConfig] = []

    def keep(cfg: DictConfig) -> None:
        """Arguments: --config NAME|PATH, then key=value to set and ~key to remove keys of the config."""
        merged.append(cfg)

    with _argv([sys.argv[0], *resolved]):
        try:
            torchtune_config.parse(keep)()
        except SystemExit:
            if not merged:  # argparse's own: --help
                raise
        except (ValueError, TypeError, AssertionError, OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"command line {' '.join(arguments)!r}: {error}") from error
    for key, text in texts.items():
        merged[0][key] = None if text == "null" else _without_interpolation(text)
    return _with_whole_values(merged[0])


def _without_interpolation(text: str) -> str:
    """The text as OmegaConf has to be given it to give it back: `${` has a meaning there, unless behind a backslash."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _with_whole_values(cfg: DictConfig) -> DictConfig:
    """Let `key=null` and `key={...}` replace a component.

    For a key with a component, torchtune reads `key=value` as `key._component_=value`: right for the name of a builder,
    not for these two.
    """
    for name in map(str, cfg):
        node = None if OmegaConf.is_missing(cfg, name) or OmegaConf.is_interpolation(cfg, name) else cfg[name]
        if isinstance(node, DictConfig) and "_component_" in node and not isinstance(node["_component_"], str):
            cfg[name] = node["_component_"]
    return cfg


def _with_resolved_config(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the config's name replaced by the path of a file that has been read once."""
    resolved: list[str] = []
    found = False
    words = iter(arguments)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            name = word.removeprefix("--config=") if "=" in word else next(words, "")
            if not name:
                raise ConfigError(_NO_CONFIG)
            path = resolve_config(name)
            read_config(path)
            found = True
            resolved += ["--config", str(path)]
        else:
            resolved.append(word)
    if not found and not {"-h", "--help"}.intersection(arguments):
        raise ConfigError(_NO_CONFIG)
    return resolved


def read_config(path: Path) -> DictConfig:
    """Read one yaml file, without defaults or checks of its keys.

    Raises:
        ConfigError: If the file cannot be read or is not a yaml mapping.
    """
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


@contextmanager
def _argv(words: list[str]) -> Iterator[None]:
    """Let torchtune's parser, which reads sys.argv, see other words for a while."""
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _report(error: UserError) -> None:
    """Print a user error once per run: by rank 0 if it has it, else by the rank that does. A lost rank has no time."""
    rank = _rank()
    if rank != 0 and not isinstance(error, LostRankError):
        time.sleep(_SECONDS_FOR_RANK_ZERO)
    origin = f" (rank {rank})" if rank != 0 else ""
    print(f"error{origin}: {error}", file=sys.stderr, flush=True)
