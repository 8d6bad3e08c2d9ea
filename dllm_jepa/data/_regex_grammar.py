r"""Syntax trees of the built-in (description, regex) pairs, their regex text, and the rule that keeps them meaningful.

A line is one clause, its complement, or two clauses joined; a clause holds one or two items; an item is a unit, a
repeated unit, or a choice of two units. Nothing nests deeper, so every construct can have words of its own.

The dialect is that of NL-RX: `|` binds weakest, then `&` (intersection), concatenation, the postfix `+ {n} {n,}` and
last the prefix `~` (complement); `\b` is a zero-width word boundary.

No language is empty or all-accepting, by construction:
- every item needs at least one character, so a clause accepts some line and rejects the empty one; its complement the
  other way round; and the union of two clauses like a clause;
- two clauses are joined only when `independent` finds, for each of them, a line that it accepts and the other one
  rejects: then A & ~B is not empty, and neither A & B nor A | B is just A or B again;
- of two joined clauses at most one fixes the start and at most one the end, and none fixes the whole line, so a line
  of both is found by putting their texts side by side.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

ClauseKind = Literal["contains", "starts", "ends", "sequence", "adjacent", "whole_word", "only"]
LineKind = Literal["plain", "not", "and", "or", "but_not", "neither"]

# Between the texts of a witness line: belongs to no unit, and is no word character.
_GAP = "-"


@dataclass(frozen=True)
class Unit:
    """A character class or a fixed word.

    Args:
        regex: its regex piece.
        phrase: its English name with article, `a number` or `the string dog`.
        members: characters of the class; "" for a fixed word.
        samples: two texts that the unit matches, as different as possible: witnesses are built from them.
    """

    regex: str
    phrase: str
    members: str
    samples: tuple[str, str]

    @property
    def is_word(self) -> bool:
        """Whether this is a fixed word, which needs parentheses under a repeat."""
        return not self.members

    def occurs(self, text: str, times: int) -> bool:
        """Whether `text` has a match of `times` units in a row."""
        if self.is_word:
            return self.regex * times in text
        run = longest = 0
        for character in text:
            run = run + 1 if character in self.members else 0
            longest = max(longest, run)
        return longest >= times


@dataclass(frozen=True)
class Item:
    """One unit (`repeat` 0), a unit at least or exactly `repeat` times, or a choice of two units.

    Args:
        unit: the unit, or the first of a choice.
        other: the second unit of a choice; None otherwise.
        repeat: times the unit is repeated, 1 or more; 0 for no repeat. A choice is never repeated.
        exactly: exactly `repeat` times instead of at least.
    """

    unit: Unit
    other: Unit | None = None
    repeat: int = 0
    exactly: bool = False

    def regex(self, *, canonical: bool = False) -> str:
        """The regex of the item; `canonical` sorts the two units of a choice."""
        if self.other is not None:
            options = [self.unit.regex, self.other.regex]
            return f"({'|'.join(sorted(options) if canonical else options)})"
        if self.repeat == 0:
            return self.unit.regex
        base = f"({self.unit.regex})" if self.unit.is_word else self.unit.regex
        if self.exactly:
            return f"{base}{{{self.repeat}}}"
        return f"{base}+" if self.repeat == 1 else f"{base}{{{self.repeat},}}"

    def sample(self, variant: int) -> str:
        """A short text that the item matches; `variant` 0 or 1 picks the sample of the unit."""
        return self.unit.samples[variant] * max(1, self.repeat)

    def occurs(self, text: str) -> bool:
        """Whether the item matches a part of `text`."""
        units = [self.unit] if self.other is None else [self.unit, self.other]
        return any(unit.occurs(text, max(1, self.repeat)) for unit in units)


@dataclass(frozen=True)
class Clause:
    """A condition on a whole line.

    Args:
        kind: where the items have to be.
        items: two for `sequence` and `adjacent`, one otherwise.
    """

    kind: ClauseKind
    items: tuple[Item, ...]

    def regex(self, *, canonical: bool = False) -> str:
        """The regex of the clause, which matches whole lines."""
        return _CLAUSE_REGEX[self.kind](*[item.regex(canonical=canonical) for item in self.items])

    def witness(self, variant: int) -> str:
        """A line that the clause accepts."""
        gap = "" if self.kind == "adjacent" else _GAP
        return gap.join(item.sample(variant) for item in self.items)


_CLAUSE_REGEX: dict[ClauseKind, Callable[..., str]] = {
    "contains": lambda item: f".*{item}.*",
    "starts": lambda item: f"{item}.*",
    "ends": lambda item: f".*{item}",
    "sequence": lambda first, second: f".*{first}.*{second}.*",
    "adjacent": lambda first, second: f".*{first}{second}.*",
    "whole_word": lambda item: f".*\\b{item}\\b.*",
    "only": lambda item: item,
}

_LINE_REGEX: dict[LineKind, Callable[..., str]] = {
    "plain": lambda clause: clause,
    "not": lambda clause: f"~({clause})",
    "and": lambda first, second: f"({first})&({second})",
    "or": lambda first, second: f"({first})|({second})",
    "but_not": lambda first, second: f"({first})&~({second})",
    "neither": lambda first, second: f"~(({first})|({second}))",
}


@dataclass(frozen=True)
class Line:
    """The root of a tree.

    Args:
        kind: how the clauses are joined.
        clauses: one for `plain` and `not`, two otherwise.
    """

    kind: LineKind
    clauses: tuple[Clause, ...]

    def regex(self, *, canonical: bool = False) -> str:
        """The regex of the line; `canonical` sorts the operands of `|` and `&`, so that order makes no difference."""
        texts = [clause.regex(canonical=canonical) for clause in self.clauses]
        if canonical and self.kind != "but_not":
            texts.sort()
        return _LINE_REGEX[self.kind](*texts)


def independent(first: Clause, second: Clause) -> bool:
    """Whether two clauses may be joined: each accepts a line that the other rejects, and one line satisfies both.

    Sound but cautious: it says no to some pairs that could be joined.
    """
    kinds = (first.kind, second.kind)
    if "only" in kinds or kinds in (("starts", "starts"), ("ends", "ends")):
        return False
    return _escapes(first, second) and _escapes(second, first)


def _escapes(clause: Clause, other: Clause) -> bool:
    """Whether a witness of `clause` lacks something that every line of `other` has."""
    return any(not item.occurs(clause.witness(variant)) for variant in (0, 1) for item in other.items)
