"""What a type allows, in words."""

import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Annotated, Any, Literal, Union

import annotated_types as at
from pydantic import BaseModel
from pydantic.fields import FieldInfo

COMPONENT = "a mapping with `_component_: package.builder` and its keyword arguments"


@dataclass(frozen=True)
class Phrase:
    """In an annotation: what is allowed, in words, where the type does not say it."""

    words: str


def describe(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a type allows, in words: `an integer >= 1 or null`.

    Args:
        annotation: the type.
        metadata: bounds and phrases, as `Annotated` holds them.
    """
    origin, members = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return describe(members[0], [*members[1:], *metadata])
    for entry in metadata:
        if isinstance(entry, FieldInfo):
            return describe(annotation, [e for e in metadata if e is not entry] + entry.metadata)
    if origin in (Union, types.UnionType):
        names = [describe(member, metadata) for member in members if member is not types.NoneType]
        return " or ".join(dict.fromkeys([*names, *(["null"] if types.NoneType in members else [])]))
    for entry in metadata:
        if isinstance(entry, Phrase):
            return entry.words
    if origin is Literal:
        return "one of " + ", ".join(map(str, members))
    if isinstance(origin, type) and issubclass(origin, tuple) and members[-1:] != (Ellipsis,):
        return f"a list [{', '.join(map(describe, members))}]"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a list, each {describe(members[0])}" if members else "a list"
    return _described_class(annotation, metadata)


def _described_class(annotation: Any, metadata: Sequence[Any]) -> str:
    if annotation is bool:
        return "true or false"
    if annotation in (int, float):
        return ("an integer" if annotation is int else "a number") + _range(metadata)
    if annotation is types.NoneType:
        return "null"
    if isinstance(annotation, type):
        if issubclass(annotation, PurePath):
            return "a path"
        if issubclass(annotation, str):
            return "a text"
        if issubclass(annotation, BaseModel):
            return "a mapping with the keys " + ", ".join(annotation.model_fields)
        if annotation.__name__ == "Component":
            return COMPONENT
        if issubclass(annotation, Mapping):
            return "a mapping"
        return annotation.__name__
    return str(annotation).replace("typing.", "")


def _range(metadata: Sequence[Any]) -> str:
    signs = {at.Ge: ">=", at.Gt: ">", at.Le: "<=", at.Lt: "<"}
    signed = [(signs[type(e)], getattr(e, type(e).__name__.lower())) for e in metadata if type(e) in signs]
    bounds = {sign[0]: (sign, bound) for sign, bound in signed}
    if len(bounds) == 2:
        (low, least), (high, most) = bounds[">"], bounds["<"]
        return f" in {'[' if low == '>=' else '('}{least}, {most}{']' if high == '<=' else ')'}"
    return "".join(f" {sign} {bound}" for sign, bound in bounds.values())
