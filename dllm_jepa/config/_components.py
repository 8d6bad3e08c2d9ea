"""Checks of `_component_` mappings: the path imports and the arguments fit the signature."""

import importlib
import inspect
import math
import os
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from types import ModuleType
from typing import Any, Literal, Union

from dllm_jepa.config._kinds import Component
from dllm_jepa.config._wording import shown, suggestion

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class Unset:
    """Stands for a value that is not known yet (`???`); nothing is checked about it."""

    def __repr__(self) -> str:
        return "???"


UNSET = Unset()


def locate(path: str) -> object:
    """Import the object that a dotted path names.

    Raises:
        LookupError: If a part of the path does not import or is not there; the message says which, and what is near.
    """
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts):
        raise LookupError(f"{path!r} is not a dotted path such as package.module.builder")
    found: object = None
    for index, part in enumerate(parts):
        prefix = ".".join(parts[: index + 1])
        if index > 0 and hasattr(found, part):
            found = getattr(found, part)
            continue
        if index > 0 and not isinstance(found, ModuleType):
            raise LookupError(f"{path!r}: {'.'.join(parts[:index])} has no {part!r}")
        try:
            found = importlib.import_module(prefix)
        except (ImportError, SyntaxError) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == prefix:
                raise LookupError(_absent(path, part, found)) from error
            raise LookupError(f"{path!r}: importing {prefix} fails: {type(error).__name__}: {error}") from error
    return found


def _absent(path: str, part: str, parent: object) -> str:
    """Say that `parent` has no `part`, and what it has."""
    if not isinstance(parent, ModuleType):
        return f"{path!r}: no module named {part!r}; install it, or run where it can be imported"
    names = {*dir(parent), *(module.name for module in pkgutil.iter_modules(getattr(parent, "__path__", ())))}
    public = sorted(name for name in names if not name.startswith("_"))
    return f"{path!r}: {parent.__name__} has no {part!r}.{suggestion(part, public)}"


def component_problems(key: str, node: Mapping[str, Any], kind: Component) -> list[str]:
    """Return what is wrong with a component's path and arguments, one line each.

    Args:
        key: Config key, for the messages.
        node: The mapping, with `_component_` and arguments; `UNSET` where a value is not known.
        kind: Its declaration.
    """
    path = node["_component_"]
    if kind.refusal is not None and (refused := kind.refusal(node)):
        return refused
    try:
        builder = locate(path)
    except LookupError as error:
        return [f"{key}._component_: {error.args[0]}"]
    if not callable(builder):
        return [f"{key}._component_: {path!r} is {type(builder).__name__}, not something that can be called"]
    arguments = {name: value for name, value in node.items() if name != "_component_"}
    try:
        signature = inspect.signature(builder)
    except ValueError:  # written in C without a text signature: nothing to compare with
        return []
    problems = _call_problems(key, path, signature, kind)
    problems += _name_problems(key, path, arguments, signature, kind)
    problems += _type_problems(key, arguments, _annotations(builder))
    for limit in kind.ranges:
        value = arguments.get(limit.argument, UNSET)
        if (
            limit.component in (None, path)
            and value is not UNSET
            and value is not None
            and not limit.number.allows(value)
        ):
            problems.append(f"{key}.{limit.argument}: {shown(value)} given, must be {limit.number.describe()}")
    return problems


def _call_problems(key: str, path: str, signature: inspect.Signature, kind: Component) -> list[str]:
    """Return why the recipe could not call the builder, whatever the yaml says."""
    parameters = list(signature.parameters.values())
    variadic = any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    takes = sum(parameter.kind in _BY_POSITION for parameter in parameters)
    if takes < len(kind.positional) and not variadic:
        wanted = ", ".join(kind.positional)
        return [f"{key}._component_: {path} does not take what the recipe passes by position: {wanted}"]
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return []
    named = {parameter.name for parameter in parameters if parameter.kind in _BY_NAME}
    absent = [name for name in kind.keywords + kind.optional if name not in named]
    return [f"{key}._component_: {path} does not take {name!r}, which the recipe passes" for name in absent]


def _name_problems(
    key: str, path: str, arguments: Mapping[str, Any], signature: inspect.Signature, kind: Component
) -> list[str]:
    """Return unknown, doubly given and missing arguments."""
    parameters = list(signature.parameters.values())
    named = {parameter.name for parameter in parameters if parameter.kind in _BY_NAME}
    passed = {parameter.name for parameter in parameters[: len(kind.positional)]}
    passed |= {*kind.keywords, *kind.offered}
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    choices = sorted(named - passed)
    problems = []
    for name, value in arguments.items():
        if name in passed:
            problems.append(f"{key}.{name}: {shown(value)} given, but the recipe passes this one itself; remove it")
        elif name not in named and not open_ended:
            problems.append(
                f"{key}.{name}: {path} has no such argument.{suggestion(name, choices)} "
                f"It takes: {', '.join(choices) or 'nothing'}; ~{key}.{name} on the command line removes it"
            )
    for parameter in parameters:
        needed = parameter.kind in _BY_NAME and parameter.default is inspect.Parameter.empty
        if needed and parameter.name not in {*arguments, *passed, *kind.optional}:
            problems.append(f"{key}.{parameter.name}: missing; {path} needs it")
    return problems


def _annotations(builder: Callable[..., Any]) -> dict[str, Any]:
    """Return the resolved annotations of a builder's parameters; empty where they cannot be resolved."""
    function = builder.__init__ if inspect.isclass(builder) else builder
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # names that exist for the type checker only
        return {}


def _type_problems(key: str, arguments: Mapping[str, Any], annotations: Mapping[str, Any]) -> list[str]:
    """Return arguments whose value cannot be what the annotation says."""
    return [
        f"{key}.{name}: {shown(value)} given, must be {_spell(annotations[name])}"
        for name, value in arguments.items()
        if name in annotations and value is not UNSET and not _fits(value, annotations[name])
    ]


def _spell(annotation: Any) -> str:
    """Write an annotation the way a user would."""
    if typing.get_origin(annotation) is Literal:
        return " or ".join(map(str, typing.get_args(annotation)))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _fits(value: object, annotation: Any) -> bool:
    """Return whether a yaml value can stand for a parameter annotated like this; True when in doubt."""
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(_fits(value, member) for member in members)
    if origin is Literal:
        return any(value == member and isinstance(value, bool) == isinstance(member, bool) for member in members)
    if origin is typing.Annotated:
        return _fits(value, members[0])
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return _fits_sequence(value, origin, members)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping)
    if annotation is None or annotation is types.NoneType:
        return value is None
    return _fits_class(value, annotation) if isinstance(annotation, type) else True


def _fits_class(value: object, annotation: type) -> bool:
    """Return whether a yaml value can stand for a parameter annotated with a plain class."""
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if issubclass(annotation, PurePath) or annotation is os.PathLike:
        return isinstance(value, str)
    if issubclass(annotation, (list, tuple)):
        return isinstance(value, list)
    if getattr(annotation, "_is_protocol", False):
        return True
    return isinstance(value, annotation)


def _fits_sequence(value: object, origin: type, members: tuple[Any, ...]) -> bool:
    """Return whether a yaml list can stand for `list[x]`, `Sequence[x]`, `tuple[x, ...]` or `tuple[x, y]`."""
    if not isinstance(value, list):
        return False
    if issubclass(origin, tuple) and members and members[-1] is not Ellipsis:
        return len(value) == len(members) and all(map(_fits, value, members))
    return not members or all(_fits(item, members[0]) for item in value)
