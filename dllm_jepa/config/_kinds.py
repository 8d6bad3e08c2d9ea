"""The kinds of values that a config key can hold, as data: what is allowed, and how to say so in one phrase."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


class _Required:
    """Stands in `Key.default` for a key without a default."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = _Required()


@dataclass(frozen=True)
class Text:
    """A string that is not empty.

    Args:
        phrase: What is allowed, in words.
        verbatim: Whether a word `key=TEXT` of the command line holds the text itself, not yaml: what people write
            freely has colons, hashes and equals signs. `null` is still null.
    """

    phrase: str = "a text"
    verbatim: bool = False

    def describe(self) -> str:
        """Return what is allowed, in words."""
        return self.phrase

    def allows(self, value: object) -> bool:
        """Return whether `value` may stand here."""
        return isinstance(value, str) and value.strip() != ""


@dataclass(frozen=True)
class Flag:
    """True or false."""

    def describe(self) -> str:
        """Return what is allowed, in words."""
        return "true or false"

    def allows(self, value: object) -> bool:
        """Return whether `value` may stand here."""
        return isinstance(value, bool)


@dataclass(frozen=True)
class Number:
    """A finite number in a range; the ends belong to it unless they are open.

    Args:
        integer: Whether only whole numbers are allowed.
        low: Smallest value, or None.
        high: Largest value, or None.
        low_open: Whether `low` itself is outside.
        high_open: Whether `high` itself is outside.
    """

    integer: bool = False
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    high_open: bool = False

    def describe(self) -> str:
        """Return what is allowed, in words."""
        noun = "an integer" if self.integer else "a number"
        if self.low is not None and self.high is not None:
            return f"{noun} in {'(' if self.low_open else '['}{self.low}, {self.high}{')' if self.high_open else ']'}"
        if self.low is not None:
            return f"{noun} {'>' if self.low_open else '>='} {self.low}"
        if self.high is not None:
            return f"{noun} {'<' if self.high_open else '<='} {self.high}"
        return noun

    def allows(self, value: object) -> bool:
        """Return whether `value` may stand here."""
        if isinstance(value, bool) or not isinstance(value, int if self.integer else (int, float)):
            return False
        if not math.isfinite(value):
            return False
        above = self.low is None or (value > self.low if self.low_open else value >= self.low)
        below = self.high is None or (value < self.high if self.high_open else value <= self.high)
        return above and below


@dataclass(frozen=True)
class Choice:
    """One of a few words.

    Args:
        values: The words.
        refused: Words that a user may well try, each with the reason why it is not offered and what to take instead.
    """

    values: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        """Return what is allowed, in words."""
        return "one of " + ", ".join(self.values)

    def allows(self, value: object) -> bool:
        """Return whether `value` may stand here."""
        return isinstance(value, str) and value in self.values


@dataclass(frozen=True)
class ArgumentRange:
    """A range for one argument of a component that cannot be built, and so cannot complain, before a model exists.

    Args:
        argument: Name of the keyword argument.
        number: Its range.
        component: Path of the only component that it holds for, or None for every one that has the argument.
    """

    argument: str
    number: Number
    component: str | None = None


@dataclass(frozen=True)
class Component:
    """A mapping whose `_component_` names a callable and whose other entries are its keyword arguments.

    Args:
        positional: Arguments that the recipe passes by position; only their number counts.
        keywords: Arguments that the recipe always passes by name.
        optional: Arguments that the recipe passes by name unless the yaml gives them.
        offered: Arguments that the recipe passes to those builders that take them.
        ranges: Ranges of arguments, checked here because the component itself is built only beside a model.
        trial: How to build it during validation so that its own complaints (ValueError) are listed; None = not at all.
            `alone`: from its arguments; `meta`: the same, with parameters on the meta device; `optimizer`: over a
            stand-in parameter; `lr_scheduler`: over the config's own optimizer with a stand-in parameter.
        refusal: Problem lines of a mapping that is not to be built at all.
        check: What is wrong with the thing that the trial built, or None.
        paths: Arguments that only say where something is. A resumed run may have others; what it finds there is
            compared by its contents.
    """

    positional: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    offered: tuple[str, ...] = ()
    ranges: tuple[ArgumentRange, ...] = ()
    trial: Literal["alone", "meta", "optimizer", "lr_scheduler"] | None = None
    refusal: Callable[[Mapping[str, Any]], list[str]] | None = None
    check: Callable[[Any], str | None] | None = None
    paths: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return what is allowed, in words."""
        return "a mapping with `_component_: package.builder` and its keyword arguments"

    def allows(self, value: object) -> bool:
        """Return whether `value` has the form of a component; whether it fits is another question."""
        return isinstance(value, Mapping) and isinstance(value.get("_component_"), str)


@dataclass(frozen=True)
class Section:
    """A mapping of further keys."""

    keys: tuple["Key", ...]

    def describe(self) -> str:
        """Return what is allowed, in words."""
        return "a mapping with the keys " + ", ".join(key.name for key in self.keys)

    def allows(self, value: object) -> bool:
        """Return whether `value` is a mapping; its entries are checked one by one."""
        return isinstance(value, Mapping)


Kind = Text | Flag | Number | Choice | Component | Section


@dataclass(frozen=True)
class Key:
    """One config key.

    Args:
        name: The key.
        kind: What it may hold.
        doc: What it does, in one line without a full stop.
        default: Value when it is absent.
        nullable: Whether null is allowed, too.
        may_change: Whether a resumed run may have another value than the run it goes on from: the key does not decide
            what the steps compute, but for rounding.
    """

    name: str
    kind: Kind
    doc: str
    default: object = REQUIRED
    nullable: bool = False
    may_change: bool = False

    def describe(self) -> str:
        """Return what is allowed, in words."""
        return self.kind.describe() + (" or null" if self.nullable else "")

    def allows(self, value: object) -> bool:
        """Return whether `value` may stand here."""
        return self.nullable if value is None else self.kind.allows(value)
