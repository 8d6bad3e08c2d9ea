"""Builders that are put together from parts, so that the arguments that many of them take are written once."""

import inspect
import typing
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

_Built = TypeVar("_Built")


def join_builder(
    name: str, doc: str, build: Callable[..., _Built], *parts: Callable[..., object]
) -> Callable[..., _Built]:
    """Make a builder that takes the arguments of a function and the keyword-only arguments of its parts.

    Configs are checked against the signature and the annotations of a builder, so it shows all of them.

    Args:
        name: name of the builder.
        doc: what it builds; the documentation of parts and function follows.
        build: called with the parts, whose own arguments are then filled in, and behind them with its own arguments.
        parts: functions; no argument of theirs may have the name of one of `build` or of another part.
    """
    own = [[p for p in _parameters(part) if p.kind is inspect.Parameter.KEYWORD_ONLY] for part in parts]

    def builder(*args: Any, **kwargs: Any) -> _Built:
        given = [{p.name: kwargs.pop(p.name) for p in of_part if p.name in kwargs} for of_part in own]
        filled = [partial(part, **arguments) for part, arguments in zip(parts, given, strict=True)]
        return build(*filled, *args, **kwargs)

    rest = _parameters(build)[len(parts) :]
    # By position, then by name, as Python has it; those without a default first, then those of the parts.
    joined = [p for of_part in own for p in of_part] + rest
    parameters = sorted(joined, key=lambda p: (p.kind, p.default is not p.empty))
    hints: dict[str, Any] = {}
    for function in (*parts, build):
        hints |= typing.get_type_hints(function, include_extras=True)
    builder.__name__ = builder.__qualname__ = name
    builder.__module__ = build.__module__
    builder.__doc__ = "\n\n".join(filter(None, [doc, *map(inspect.getdoc, (*parts, build))]))
    builder.__annotations__ = {p.name: hints[p.name] for p in parameters} | {"return": hints["return"]}
    builder.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        parameters, return_annotation=hints["return"]
    )
    return builder


def _parameters(function: Callable[..., object]) -> list[inspect.Parameter]:
    return list(inspect.signature(function).parameters.values())
