"""`_component_` in a config: a builder named by its dotted path, and its arguments checked against its signature."""

import importlib
import inspect
import json
import pkgutil
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from pydantic import ConfigDict, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from dllm_jepa.config._describe import describe
from dllm_jepa.errors import shown, suggestion

UNSET = "???"
"""Stands in yaml for a value that only the user can give; nothing is checked about it."""


class UnsetReference(str):
    """`???` by way of a reference, such as `${checkpoint_dir}`: the other key is the one to set."""


COMPONENT_PROBLEMS = "component_problems"  # the type of the validation error that carries lines of its own

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Component:
    """A builder, by its dotted path, and the keyword arguments that the yaml gives it."""

    path: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Call the builder with what the recipe passes and what the yaml says, which wins where both give a keyword.

        Raises:
            LookupError: if the path leads nowhere.
        """
        builder: Any = locate(self.path)
        return builder(*args, **{**kwargs, **self.arguments})

    def __hash__(self) -> int:
        """Equal components have equal hashes, whatever their arguments hold."""
        return hash(json.dumps(self.as_mapping(), sort_keys=True, default=repr))

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        """The parameters of the builder by name; empty where Python cannot tell them."""
        builder: Any = locate(self.path)
        try:
            return inspect.signature(builder).parameters
        except ValueError:  # written in C without a text signature
            return {}

    def takes(self, name: str) -> bool:
        """Whether the builder has a parameter of this name."""
        return name in self.parameters

    def argument(self, name: str) -> Any:
        """An argument of the yaml, else the builder's default; None if it has no such parameter."""
        if name in self.arguments or not self.takes(name):
            return self.arguments.get(name)
        default = self.parameters[name].default
        return None if default is inspect.Parameter.empty else default

    def as_mapping(self) -> dict[str, Any]:
        """As it stands in yaml."""
        return {"_component_": self.path, **self.arguments}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Let a field of a config hold one."""
        return Given().__get_pydantic_core_schema__(source, handler)


@dataclass(frozen=True)
class Given:
    """What a recipe passes to a builder besides the arguments of the yaml; in the annotation of a `Component`.

    Args:
        positional: arguments passed by position; only their number counts.
        keywords: arguments always passed by name.
        offered: arguments passed by name to those builders that take them, unless the yaml gives them.
        paths: arguments of the yaml that only say where something is. A resumed run may have others; what it finds
            there is compared by its contents.
    """

    positional: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    offered: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()

    def __get_pydantic_core_schema__(self, _: Any, __: GetCoreSchemaHandler) -> CoreSchema:
        """Turn a mapping of the yaml into a `Component` and check it."""
        return core_schema.no_info_plain_validator_function(
            self._checked, serialization=core_schema.plain_serializer_function_ser_schema(Component.as_mapping)
        )

    def _checked(self, value: Any) -> Component:
        if isinstance(value, Component):
            return value
        if isinstance(value, str) and value != UNSET:  # key=package.builder where the yaml has null
            value = {"_component_": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("_component_"), str):
            raise PydanticCustomError("no_component", "a mapping with _component_ is wanted")
        component = Component(value["_component_"], {k: v for k, v in value.items() if k != "_component_"})
        if component.path != UNSET and (lines := component_problems(component, self)):
            raise PydanticCustomError(COMPONENT_PROBLEMS, "component", {"lines": lines})
        return component


def locate(path: str) -> object:
    """Import the object that a dotted path names.

    Raises:
        LookupError: saying which part of the path does not import or is not there, and what is near.
    """
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
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


def component_problems(component: Component, given: Given) -> list[str]:
    """What is wrong with a component, except arguments that are `???`: lines that begin behind the name of its key."""
    try:
        builder = locate(component.path)
    except LookupError as error:
        return [f"._component_: {error.args[0]}"]
    if not callable(builder):
        return [f"._component_: {component.path!r} is {type(builder).__name__}, not something that can be called"]
    parameters = component.parameters
    if not parameters:
        return []
    return [
        *_call_problems(component.path, parameters, given),
        *_name_problems(component, parameters, given),
        *_value_problems(component, builder),
    ]


def _call_problems(path: str, parameters: Mapping[str, inspect.Parameter], given: Given) -> list[str]:
    """Why the recipe could not call the builder, whatever the yaml says."""
    kinds = {parameter.kind for parameter in parameters.values()}
    takes = sum(parameter.kind in _BY_POSITION for parameter in parameters.values())
    if takes < len(given.positional) and inspect.Parameter.VAR_POSITIONAL not in kinds:
        wanted = ", ".join(given.positional)
        return [f"._component_: {path} does not take what the recipe passes by position: {wanted}"]
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return []
    absent = [name for name in given.keywords if name not in parameters]
    return [f"._component_: {path} does not take {name!r}, which the recipe passes" for name in absent]


def _name_problems(component: Component, parameters: Mapping[str, inspect.Parameter], given: Given) -> Iterator[str]:
    """Unknown, doubly given and missing arguments."""
    path, arguments = component.path, component.arguments
    named = [name for name, parameter in parameters.items() if parameter.kind in _BY_NAME]
    passed = {*list(parameters)[: len(given.positional)], *given.keywords}
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    choices = [name for name in named if name not in passed]
    for name, value in arguments.items():
        if name in passed:
            yield f".{name}: {shown(value)} given, but the recipe passes this one itself; remove it"
        elif name not in named and not open_ended:
            yield (
                f".{name}: {path} has no such argument.{suggestion(name, choices)} "
                f"It takes: {', '.join(choices) or 'nothing'}; ~KEY.{name} on the command line removes it"
            )
    for name in choices:
        if parameters[name].default is inspect.Parameter.empty and name not in {*arguments, *given.offered}:
            yield f".{name}: missing; {path} needs it"


def _value_problems(component: Component, builder: Callable[..., Any]) -> Iterator[str]:
    """Arguments whose values are not what the annotations of the builder say."""
    try:
        function = builder.__init__ if inspect.isclass(builder) else builder
        annotations = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError):  # names that exist for the type checker only
        return
    for name, value in component.arguments.items():
        if name not in annotations or value == UNSET:
            continue
        try:
            config = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
            adapter: TypeAdapter[Any] = TypeAdapter(annotations[name], config=config)
        except PydanticUserError:  # an annotation that it cannot judge: the builder will
            continue
        try:
            # As JSON, which is what yaml gives: a list may stand for a tuple, and a text for a path.
            adapter.validate_json(json.dumps(value), strict=True)
        except ValidationError:
            yield f".{name}: {shown(value)} given, must be {describe(annotations[name])}"
